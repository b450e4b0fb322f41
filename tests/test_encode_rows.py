"""Sentences as Megatron cuts them; the rest of the room is tested through whole runs in test_preprocess and test_resume."""
import numpy as np
import pytest

from ascend_nb.config import PreprocessConfig
from ascend_nb.core import UserError
from ascend_nb.encode_rows import sentence_splitter
from ascend_nb.indexed import IndexedReader
from ascend_nb.preprocess import run


@pytest.fixture
def punkt(shared_data, tmp_path, monkeypatch):
    "Punkt, trained here on real text, where nltk looks for its data."
    nltk = pytest.importorskip("nltk", reason="nltk is absent: pip install nltk")
    from nltk.tokenize import punkt as p
    text = "\n".join((shared_data / "pretrain" / "wiki_demo.txt").read_text(encoding="utf-8").splitlines()[:6])
    folder = tmp_path / "nltk" / "tokenizers" / "punkt_tab" / "english"; folder.mkdir(parents=True)
    monkeypatch.setattr(nltk.data, "path", [str(tmp_path / "nltk")])
    params = p.PunktTrainer(text).get_params()
    p.save_punkt_params(params, str(folder))
    return p.PunktSentenceTokenizer(params)


@pytest.mark.parametrize("eod", [False, True])
def test_a_sequence_for_each_sentence(shared_data, punkt, tmp_path, eod):
    rows = [x for x in (shared_data / "pretrain" / "wiki_demo.txt").read_text(encoding="utf-8").splitlines()[:12] if x]
    (tmp_path / "x.txt").write_text("\n\n".join(rows) + "\n", encoding="utf-8")
    tok = shared_data / "tokenizers" / "qwen2"
    out = run(PreprocessConfig(input=str(tmp_path / "x.txt"), output_prefix=str(tmp_path / "x"), tokenizer_name_or_path=str(tok), split_sentences=True, append_eod=eod), json=True)
    import tokenizers
    rust = tokenizers.Tokenizer.from_file(str(tok / "tokenizer.json"))
    want = [[rust.encode(s).ids for s in punkt.tokenize(t)] for t in rows]
    for doc in want: doc[-1] += [rust.token_to_id("<|im_end|>")] * eod
    pair = IndexedReader(tmp_path / "x_text_sentence")
    assert out["files"] == [str(tmp_path / "x_text_sentence")] and len(pair) > 3 * len(rows) and out["documents"] == len(rows)
    assert [s.tolist() for s in pair[:]] == [s for d in want for s in d]
    assert np.array_equal(pair.document_indices, np.cumsum([0, *map(len, want)]))


def test_line_breaks_stay_with_the_sentence_before(punkt):
    text = "The first one ends here.\n\nThe second, too! \nThird."
    assert sentence_splitter()(text) == ["The first one ends here.", "The second, too!", "Third."]
    assert sentence_splitter(True)(text) == ["The first one ends here.\n\n", "The second, too! \n", "Third."]


def test_absent_data_is_one_sentence(monkeypatch):
    nltk = pytest.importorskip("nltk", reason="nltk is absent: pip install nltk")
    monkeypatch.setattr(nltk.data, "path", [])
    with pytest.raises(UserError, match="nltk.downloader punkt_tab"): sentence_splitter()
