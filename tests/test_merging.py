"""Merged pairs against Megatron's add_index and against the files they come from."""
import numpy as np
import pytest
from test_indexed import both, mcore, random_docs  # noqa: F401 - a fixture

from ascend_nb.config import PreprocessConfig
from ascend_nb.core import UserError
from ascend_nb.indexed import IndexedReader, IndexedWriter
from ascend_nb.preprocess import run


def write(prefix, docs, dtype=np.int32):
    with IndexedWriter(prefix, dtype) as w:
        for doc in docs:
            for s in doc: w.add(s)
            w.end_document()


def config(folder, out, *keys): return PreprocessConfig(input=str(folder), output_prefix=str(out), merge_group_keys=list(keys))


@pytest.mark.parametrize("dtype", [np.int32, np.uint16])
def test_bytes_are_megatrons(mcore, tmp_path, dtype):  # noqa: F811
    for i, name in enumerate("cab"): write(tmp_path / f"{name}_text_document", random_docs(i, dtype, [1, 40, 300][i]), dtype)
    write(tmp_path / "a_title_document", random_docs(9, dtype, 5), dtype)
    theirs = mcore.IndexedDatasetBuilder(str(tmp_path / "theirs.bin"), dtype=dtype)
    for name in "abc": theirs.add_index(str(tmp_path / f"{name}_text_document"))
    theirs.finalize(str(tmp_path / "theirs.idx"))
    out = run(config(tmp_path, tmp_path / "out" / "all", "text_document"), json=True)
    assert out["files"] == [str(tmp_path / "out" / "all_text_document")] and both(out["files"][0]) == both(tmp_path / "theirs")
    assert out["sequences"] == [len(IndexedReader(out["files"][0]))] and out["tokens"] == IndexedReader(out["files"][0]).num_tokens


def test_a_real_pair_twice(shared_data, tmp_path):
    "More tokens than one block holds."
    web = shared_data / "megatron" / "meg-gpt2-openwebtext_text_document"
    for name in "ab":
        for e in (".bin", ".idx"): (tmp_path / f"{name}_text_document{e}").symlink_to(f"{web}{e}")
    out, real = IndexedReader(run(config(tmp_path, tmp_path / "x", "text_document"), json=True)["files"][0]), IndexedReader(web)
    assert np.array_equal(out.tokens, np.tile(real.tokens, 2)) and np.array_equal(out.lengths, np.tile(real.lengths, 2))
    assert out.document_indices.tolist() == list(range(2001)) and out.dtype == np.uint16


def test_parts_that_modellink_left_merge(tmp_path):
    "Its names of parts, 000_of_001_…, sort as they should; three keys at once; an empty document in between."
    for k, docs in enumerate(([[[1, 2]], [[3]]], [[[4, 5, 6]]])):
        for key in ("input_ids", "attention_mask", "labels"): write(tmp_path / f"{k:03d}_of_001_alpaca_packed_{key}_document", docs)
    out = run(config(tmp_path, tmp_path / "alpaca", *(f"packed_{k}_document" for k in ("input_ids", "attention_mask", "labels"))), json=True)
    for f in out["files"]: assert [s.tolist() for s in IndexedReader(f)[:]] == [[1, 2], [3], [4, 5, 6]]
    assert run(config(tmp_path, tmp_path / "alpaca", "packed_labels_document"), json=True)["sequences"] == [3] # not itself once more


def test_mistakes(tmp_path):
    write(tmp_path / "a_packed_input_ids_document", [[[1]], [[2]]]); write(tmp_path / "a_packed_labels_document", [[[1]]])
    write(tmp_path / "a_text_document", [[[1]]], np.uint16); write(tmp_path / "b_text_document", [[[1]]], np.int32)
    def fails(says, *keys, folder=tmp_path):
        with pytest.raises(UserError, match=says): run(config(folder, tmp_path / "out", *keys), json=True)
        assert not [p for p in tmp_path.iterdir() if p.name.startswith((".", "out"))]
    fails("2 of packed_input_ids_document, 1 of packed_labels_document", "packed_input_ids_document", "packed_labels_document")
    fails("Found int32 in .*b_text_document, and uint16 in .*a_text_document", "text_document")
    fails("no .bin/.idx pair with 'txt'", "txt")
    fails("a folder of .bin/.idx pairs", "text_document", folder=tmp_path / "nowhere")
    (tmp_path / "b_text_document.bin").unlink()
    fails("b_text_document.idx without its other half", "text_document")
    (tmp_path / "b_text_document.idx").unlink(); (tmp_path / "a_text_document.bin").write_bytes(b"")
    fails("cut off", "text_document")
