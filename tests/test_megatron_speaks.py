"""Megatron checkpoints cut for several ranks speak as they lie: the words are those of transformers with the original folder."""
import pytest
import torch

from ascend_nb.chat import Chat
from ascend_nb.config import ChatConfig, GenerateConfig, ModelLinkConvertConfig
from ascend_nb.convert import run as convert
from ascend_nb.core import UserError
from ascend_nb.generate import load, run
from ascend_nb.templates import encode_prompt
from ascend_nb.tokenizers import load_tokenizer

CUTS = {"core": dict(to="mcore", target_tensor_parallel_size=2, target_pipeline_parallel_size=2), "legacy": dict(to="legacy", target_tensor_parallel_size=2), "padded": dict(to="mcore", make_vocab_size_divisible_by=128, target_pipeline_parallel_size=2)}


@pytest.fixture(scope="module")
def original(samples, tmp_path_factory):
    "A folder that transformers wrote, and its model."
    import transformers
    path, tok = tmp_path_factory.mktemp("original") / "m", load_tokenizer(samples / "tokenizer")
    torch.manual_seed(1)
    config = transformers.LlamaConfig(vocab_size=tok.vocab_size, hidden_size=48, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=256,
                                      initializer_range=.3, bos_token_id=None, eos_token_id=tok.eos_token_id, pad_token_id=None)
    model = transformers.LlamaForCausalLM(config).eval()
    model.save_pretrained(path)
    tok.save(path)
    return path, model, tok


@pytest.mark.parametrize("cut", CUTS)
def test_a_checkpoint_speaks_as_it_lies(original, tmp_path, cut):
    folder, hf, tok = original
    convert(ModelLinkConvertConfig(load_dir=str(folder), save_dir=str(tmp_path / "mg"), **CUTS[cut]), json=True)

    def theirs(ids):
        x = torch.tensor([ids])
        return tok.decode(hf.generate(x, attention_mask=torch.ones_like(x), max_new_tokens=16, do_sample=False, pad_token_id=0)[0, len(ids):].tolist()).rstrip("\ufffd")
    how = dict(model=str(tmp_path / "mg"), tokenizer=str(folder), max_new_tokens=16)
    assert run(GenerateConfig(**how, prompt="The ferry"), json=True)["text"].rstrip("\ufffd") == theirs(tok.encode("The ferry"))
    cfg = ChatConfig(**how, task="greedy")
    assert Chat(*load(cfg), cfg).ask("Who?").rstrip("\ufffd") == theirs(encode_prompt([dict(role="user", content="Who?")], tok))
    with pytest.raises(UserError, match="expected --tokenizer FOLDER"): load(ChatConfig(model=how["model"]))


def test_a_tokenizer_of_another_model_is_told(original, tmp_path):
    import transformers
    small = transformers.LlamaConfig(vocab_size=300, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=2)
    transformers.LlamaForCausalLM(small).save_pretrained(tmp_path / "m")
    with pytest.raises(UserError, match="1,024 entries.*300 rows"): load(GenerateConfig(model=str(tmp_path / "m"), tokenizer=str(original[0])))
