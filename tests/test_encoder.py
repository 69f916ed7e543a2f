"""Texts to vectors, checkpoints in and out, and what is said of bad ones."""

import json
import lzma
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers, processors

import llm2vec
from data.corpus import WIKIPEDIA, read_documents
from llm2vec import (
    Config,
    Decoder,
    LLM2Vec,
    ahead,
    encode_file,
    load_tokenizer,
    pool,
    tokenize,
)

ROOT = Path(__file__).parent.parent
TINY = ROOT / "data" / "tiny-llama"
WORDS = ["[PAD]", "<s>", "a", "b", "c", "find", "this", "_"]


@pytest.fixture(scope="module")
def encoder() -> LLM2Vec:
    return LLM2Vec.from_pretrained(TINY)


@pytest.fixture
def folder(tmp_path) -> Path:
    """A whole checkpoint of a very small untied Llama, whose tokenizer puts a BOS in front."""
    config = {
        "model_type": "llama",
        "vocab_size": len(WORDS),
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    torch.manual_seed(0)
    state = Decoder(Config.from_pretrained(tmp_path)).state_dict()
    named = {k if k.startswith("lm_head") else f"model.{k}": v for k, v in state.items()}
    save_file(named, tmp_path / "model.safetensors")
    vocab = {word: i for i, word in enumerate(WORDS)}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="[PAD]"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.add_special_tokens(["[PAD]", "<s>"])
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 1)]
    )
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    return tmp_path


def edit(file: Path, **changes) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


# --- Vectors -----------------------------------------------------------------------------------


def test_a_vector_does_not_depend_on_its_neighbours(encoder):
    texts = [text[: 40 + 17 * i] for i, text in enumerate(read_documents(WIKIPEDIA)[:64])]
    alone = np.concatenate([encoder.encode([text]) for text in texts])
    assert alone.dtype == np.float32 and alone.shape == (64, encoder.decoder.config.hidden_size)
    scale = np.abs(alone).max()
    for max_tokens in (1, 300, 100_000):
        together = encoder.encode(texts, max_tokens=max_tokens)
        assert np.abs(together - alone).max() < 1e-5 * max(1, scale)
    backwards = encoder.encode(texts[::-1])[::-1]
    assert np.abs(backwards - alone).max() < 1e-5 * max(1, scale)


def test_a_vector_does_not_depend_on_its_neighbours_in_bfloat16():
    encoder = LLM2Vec.from_pretrained(TINY, dtype=torch.bfloat16)
    texts = read_documents(WIKIPEDIA)[:16]
    alone = np.concatenate([encoder.encode([text]) for text in texts])
    together = encoder.encode(texts)
    norms = np.linalg.norm(alone, axis=1) * np.linalg.norm(together, axis=1)
    assert ((alone * together).sum(1) / norms).min() > 0.9999


def test_an_empty_text_has_a_finite_vector(encoder, folder):
    for model in (encoder, LLM2Vec.from_pretrained(folder)):
        vectors = model.encode(["", "  ", "a b", "\n"])
        assert np.isfinite(vectors).all() and (np.abs(vectors).max(1) > 0).all()
        assert np.array_equal(model.encode([""])[0], model.encode(["", "a"])[0]) or np.allclose(
            model.encode([""])[0], model.encode(["", "a"])[0], atol=1e-5
        )
    assert encoder.encode([]).shape == (0, encoder.decoder.config.hidden_size)


@pytest.mark.parametrize("texts, name", [([1], "int"), (["a", None], "None"), ("a", "one string")])
def test_what_is_not_a_list_of_strings_is_refused(encoder, texts, name):
    with pytest.raises(ValueError, match=name):
        encoder.encode(texts)


DIRT = ["", " ", "\n", "\x00", "a\x00b", "\u200b", "\ufeffbom", "a\r\nb", "<|endoftext|>"]
DIRT += ["\u05e9\u05dc\u05d5\u05dd \u202eright to left", "e\u0301\u0302\u0303" * 50]
DIRT += ["\U0001f600" * 300, "ten megabytes " * 700_000]


def test_dirty_text_has_a_finite_vector_alone_and_among_others(encoder):
    others = ["A sentence among others.", "And another one, which is longer."] * 31
    for dirt in DIRT:
        alone, among = encoder.encode([dirt])[0], encoder.encode([*others, dirt])[-1]
        assert np.isfinite(alone).all()
        assert np.abs(alone - among).max() < 1e-5 * max(1, np.abs(alone).max())


def test_half_a_surrogate_pair_is_refused(encoder):
    with pytest.raises(ValueError, match="text 1 holds half a surrogate pair"):
        encoder.encode(["fine", "a \ud800"])


def test_batches_as_mteb_passes_them(encoder):
    texts = ["One.", "And two.", "Three."]
    batches = ({"text": texts[i : i + 2], "id": [i]} for i in (0, 2))
    vectors = encoder.encode(batches, task_metadata=None, hf_split="test", hf_subset="default")
    assert np.array_equal(vectors, encoder.encode(texts))
    cosines = encoder.similarity(vectors, vectors)
    np.testing.assert_allclose(cosines.diagonal(), 1, atol=1e-6)
    np.testing.assert_allclose(
        encoder.similarity_pairwise(vectors, vectors[::-1])[0], cosines[0, 2]
    )
    with pytest.raises(TypeError, match="'instrution'"):
        encoder.encode(texts, instrution="typing error")


def test_bos_and_instruction_are_read_but_not_averaged(folder):
    model = LLM2Vec.from_pretrained(folder)
    tokenizer = model.tokenizer
    assert tokenize(tokenizer, ["a b"], 512) == [([1, 2, 3], [False, True, True])]
    [(ids, own)] = tokenize(tokenizer, ["a b"], 512, instruction="find this")
    assert ids == [1, 5, 6, 2, 3] and own == [False, False, False, True, True]
    hidden = model.decoder(torch.tensor([ids]))
    expected = hidden[0, 3:].mean(0).detach().numpy()
    got = model.encode(["a b"], instruction="find this")[0]
    np.testing.assert_allclose(got, expected, atol=1e-5)
    assert not np.allclose(got, model.encode(["a b"])[0], atol=1e-3)


@pytest.mark.parametrize("instruction", ["Find answers", "Find answers\n\n", "Find answers: \n "])
def test_white_space_behind_an_instruction_is_no_part_of_the_text(encoder, instruction):
    """GPT-2's rule cuts several line breaks as one token at an end, as two in front of a text."""
    [(ids, own)] = tokenize(encoder.tokenizer, ["hello there"], 512, instruction)
    of_the_text = [i for i, mine in zip(ids, own, strict=True) if mine]
    assert encoder.tokenizer.decode(of_the_text) == "hello there"
    [(bare, _)] = tokenize(encoder.tokenizer, ["hello there"], 512, " \n")
    assert encoder.tokenizer.decode(bare) == "hello there"


def test_a_long_text_is_cut_at_the_end(folder):
    tokenizer = load_tokenizer(folder)
    assert tokenize(tokenizer, ["a b c a b c"], 4)[0][0] == [1, 2, 3, 4]
    with pytest.raises(ValueError, match="leaves no room"):
        tokenize(tokenizer, ["a"], 3, instruction="find this")


def test_special_tokens_inside_a_text_are_text(folder):
    assert tokenize(load_tokenizer(folder), ["a <s>"], 512)[0][1] == [False, True, True]


# --- Checkpoints -------------------------------------------------------------------------------


def test_saving_and_loading_gives_the_same_vectors(encoder, folder, tmp_path):
    for model in (encoder, LLM2Vec.from_pretrained(folder)):
        out = tmp_path / "out"
        model.save(out)
        assert json.loads((out / "config.json").read_text())["is_causal"] is False
        again = LLM2Vec.from_pretrained(out)
        texts = ["a b", "c", "find this"]
        assert np.array_equal(model.encode(texts), again.encode(texts))
        ids = torch.tensor([[2, 3]])
        hidden = model.decoder(ids)
        assert torch.equal(model.decoder.logits(hidden), again.decoder.logits(hidden))
    assert not list(tmp_path.glob(".new-*")), "no scratch folder stays behind"


def test_saving_never_replaces_a_folder_of_something_else(encoder, tmp_path):
    (tmp_path / "thesis.txt").write_text("three years of work")
    (tmp_path / "config.json").write_text("{}")  # of any program
    with pytest.raises(ValueError, match="not a checkpoint"):
        encoder.save(tmp_path)
    assert (tmp_path / "thesis.txt").exists()


def test_names_without_prefix_and_shards_load_the_same(folder, tmp_path):
    whole = Decoder.from_pretrained(folder)
    ids = torch.tensor([[2, 3, 4]])
    state = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = sorted(state)
    weight_map = {}
    for i, part in enumerate((names[:5], names[5:])):
        file = f"model-{i + 1:05d}-of-00002.safetensors"
        save_file({name: state[name] for name in part}, folder / file)
        weight_map |= dict.fromkeys(part, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    sharded = Decoder.from_pretrained(folder)
    assert torch.equal(whole.logits(whole(ids)), sharded.logits(sharded(ids)))

    (folder / "model.safetensors.index.json").unlink()
    inner = {n.removeprefix("model."): w for n, w in state.items() if n.startswith("model.")}
    save_file(inner, folder / "model.safetensors")
    headless = Decoder.from_pretrained(folder)
    assert torch.equal(whole(ids), headless(ids))
    with pytest.raises(ValueError, match="lm_head"):
        headless.logits(headless(ids))
    save_again = LLM2Vec(headless, load_tokenizer(folder))
    save_again.save(tmp_path / "again")
    assert torch.equal(whole(ids), Decoder.from_pretrained(tmp_path / "again")(ids))


def test_weights_arrive_in_the_type_that_was_asked_for(folder):
    decoder = Decoder.from_pretrained(folder, torch.bfloat16)
    assert {p.dtype for p in decoder.parameters()} == {torch.bfloat16}
    assert not any(p.is_meta for p in decoder.parameters())


# --- What is said of bad input -----------------------------------------------------------------


def break_tensor(folder: Path, change) -> None:
    file = folder / "model.safetensors"
    state = load_file(file)
    change(state)
    save_file(state, file)


def drop(state):
    del state["model.layers.1.mlp.up_proj.weight"]


def rename(state):
    state["model.layers.1.mlp.upp_proj.weight"] = state.pop("model.layers.1.mlp.up_proj.weight")


def reshape(state):
    name = "model.layers.0.self_attn.k_proj.weight"
    state[name] = state[name][:-1].contiguous()


def retype(state):
    state["model.norm.weight"] = state["model.norm.weight"].int()


def spoil(state):
    state["model.norm.weight"][3] = float("inf")


@pytest.mark.parametrize(
    "change, name",
    [
        (drop, "layers.1.mlp.up_proj.weight is missing"),
        (rename, "model.layers.1.mlp.upp_proj.weight has no place"),
        (reshape, r"layers.0.self_attn.k_proj.weight is \[7, 16\], expected \[8, 16\]"),
        (retype, "model.norm.weight has type torch.int32"),
        (spoil, "model.norm.weight holds NaN or infinity"),
    ],
)
def test_a_wrong_tensor_is_named(folder, change, name):
    break_tensor(folder, change)
    with pytest.raises(ValueError, match=name):
        Decoder.from_pretrained(folder)


@pytest.mark.parametrize(
    "changes, name",
    [
        ({"model_type": "gpt2"}, "model_type is 'gpt2'"),
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu'"),
        ({"attention_bias": True}, "attention_bias is True"),
        ({"vocab_size": "8"}, "vocab_size is '8'"),
        ({"num_hidden_layers": 0}, "num_hidden_layers is 0"),
        ({"num_attention_heads": -4}, "num_attention_heads is -4"),
        ({"num_key_value_heads": 3}, "num_attention_heads is 4, expected a multiple"),
        ({"head_dim": 5}, "head_dim is 5"),
        ({"hidden_size": None}, "hidden_size is None"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 2}}, "rope_type is 'yarn'"),
        ({"rope_scaling": {"type": "linear"}}, "factor is None"),
        ({"rope_parameters": [1]}, "rope_scaling"),
        ({"rope_theta": "big"}, "rope_theta is 'big'"),
        ({"tie_word_embeddings": 1}, "tie_word_embeddings is 1"),
    ],
)
def test_a_config_that_can_not_be_run_is_refused_by_field(folder, changes, name):
    edit(folder / "config.json", **changes)
    with pytest.raises(ValueError, match=name):
        Decoder.from_pretrained(folder)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "tokenizer.json"])
def test_a_missing_file_is_named(folder, name):
    (folder / name).unlink()
    with pytest.raises(FileNotFoundError, match=name):
        LLM2Vec.from_pretrained(folder)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "tokenizer.json"])
@pytest.mark.parametrize("size", [0, 5, 100])
def test_a_truncated_file_is_named(folder, name, size):
    file = folder / name
    file.write_bytes(file.read_bytes()[:size])
    with pytest.raises(ValueError, match=name):
        LLM2Vec.from_pretrained(folder)


@pytest.mark.parametrize("target", ["../other.safetensors", "/etc/passwd", "a/b.safetensors", 7])
def test_an_index_that_leaves_its_folder_is_refused(folder, target):
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"model.norm.weight": target}}))
    with pytest.raises((ValueError, FileNotFoundError), match=str(target)):
        Decoder.from_pretrained(folder)


def test_a_tokenizer_larger_than_the_embedding_is_refused(folder):
    edit(folder / "config.json", vocab_size=4)
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        break_tensor(folder, lambda state, name=name: state.update({name: state[name][:4]}))
    with pytest.raises(
        ValueError, match="tokenizer.json: has token ids up to 7, the model embeds 4"
    ):
        LLM2Vec.from_pretrained(folder)


# --- Command line ------------------------------------------------------------------------------


def run_llm2vec(*args) -> subprocess.CompletedProcess:
    command = [sys.executable, "llm2vec.py", *map(str, args)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True)


def test_the_command_line_encodes_and_compares(encoder, tmp_path):
    texts = ["A man plays a guitar.", "", "Stocks fell."]
    (tmp_path / "texts.txt").write_text("\n".join(texts) + "\n")
    out = tmp_path / "vectors.npy"
    done = run_llm2vec(
        "encode", "--model", TINY, "--input", tmp_path / "texts.txt", "--output", out
    )
    assert done.returncode == 0, done.stderr
    np.testing.assert_allclose(np.load(out), encoder.encode(texts), atol=1e-5)
    done = run_llm2vec("similar", "--model", TINY, *texts[::2])
    assert done.returncode == 0 and done.stdout.count("1.000") == 2 and texts[0] in done.stdout


def test_json_lines_keep_their_fields(encoder, tmp_path):
    lines = [{"id": 7, "text": "One."}, {"text": "Zwei\u2028noch zwei.", "lang": "de"}]
    source, target = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert encode_file(encoder, str(source), str(target)) == 2
    found = [json.loads(line) for line in target.read_text().split("\n")[:-1]]
    vectors = np.array([line.pop("vector") for line in found])
    assert found == lines
    np.testing.assert_allclose(vectors, encoder.encode([x["text"] for x in lines]), atol=1e-5)


@pytest.mark.parametrize(
    "name, content, said",
    [
        ("a.txt", b"fine\n\xff\n", "a.txt, line 2: not UTF-8"),
        ("a.jsonl", b'{"text": "fine"}\n{"text": 3}\n', "a.jsonl, line 2: expected"),
        ("a.jsonl", b'{"text": "\\ud800"}\n', "a.jsonl, line 1: half a surrogate pair"),
    ],
)
def test_a_bad_line_leaves_no_output(encoder, tmp_path, name, content, said):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=said):
        encode_file(encoder, str(tmp_path / name), str(tmp_path / "out.npy"))
    assert [file.name for file in tmp_path.iterdir()] == [name]


def test_a_file_of_several_chunks_keeps_its_order(folder, tmp_path):
    words = ["a", "b", "c", "a b", "b c a"]
    texts = [words[i * i % 7 % 5] for i in range(2 * 4096 + 5)]
    (tmp_path / "texts.txt").write_text("\n".join(texts) + "\n")
    model = LLM2Vec.from_pretrained(folder)
    assert encode_file(model, str(tmp_path / "texts.txt"), str(tmp_path / "v.npy")) == len(texts)
    each = dict(zip(words, model.encode(words), strict=True))
    expected = np.stack([each[text] for text in texts])
    np.testing.assert_allclose(np.load(tmp_path / "v.npy"), expected, atol=1e-5)


def test_what_comes_next_is_prepared_while_a_result_is_in_use():
    started = [threading.Event() for _ in range(4)]

    def square(i: int) -> int:
        started[i].set()
        if i == 3:
            raise ValueError("three")
        return i * i

    results = ahead(square, iter(range(4)))
    for i in range(3):
        assert next(results) == i * i
        assert started[i + 1].wait(timeout=10)
    with pytest.raises(ValueError, match="three"):
        next(results)


def test_a_killed_encode_leaves_no_output_that_looks_complete(tmp_path):
    (tmp_path / "in.txt").write_text("A sentence of a few words.\n" * 200_000)
    command = [sys.executable, "llm2vec.py", "encode", "--model", TINY]
    command += ["--input", tmp_path / "in.txt", "--output", tmp_path / "out.npy"]
    process = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.DEVNULL)
    while not (tmp_path / "out.npy.part").exists() and process.poll() is None:
        time.sleep(0.05)
    process.kill()
    process.wait()
    assert process.returncode == -signal.SIGKILL and not (tmp_path / "out.npy").exists()


def test_a_save_that_is_cut_short_leaves_what_was_there(encoder, folder, tmp_path, monkeypatch):
    out = tmp_path / "out"
    LLM2Vec.from_pretrained(folder).save(out)
    before = {file: file.read_bytes() for file in out.rglob("*") if file.is_file()}
    places = (
        (llm2vec, "save_file", 1),
        (Path, "write_text", 3),
        (os, "replace", 1),
        (os, "replace", 2),
    )
    for owner, name, countdown in places:
        original = getattr(owner, name)

        def full(*args, original=original, **kwargs):
            nonlocal countdown
            countdown -= 1
            if countdown == 0:
                raise OSError(28, "No space left on device")
            return original(*args, **kwargs)

        with monkeypatch.context() as patch, pytest.raises(OSError, match="No space"):
            patch.setattr(owner, name, full)
            encoder.save(out)
        assert {file: file.read_bytes() for file in out.rglob("*") if file.is_file()} == before


@pytest.mark.parametrize(
    "args",
    [
        ("similar", "--model", "nowhere", "a"),
        ("encode", "--model", TINY, "--input", "nowhere", "--output", "x"),
    ],
)
def test_an_error_is_one_line_and_status_2(args):
    done = run_llm2vec(*args)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.count("\n") == 1 and "nowhere" in done.stderr


def test_pool_of_nothing_is_finite():
    assert pool(torch.ones(1, 2, 3), "mean", torch.zeros(1, 2)).isfinite().all()


# --- Chat templates ----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def mistral(tmp_path_factory) -> Path:
    """A folder with Mistral 7B's own tokenizer.json."""
    folder = tmp_path_factory.mktemp("mistral")
    packed = ROOT / "tests" / "golden" / "mistral-tokenizer.json.xz"
    (folder / "tokenizer.json").write_bytes(lzma.decompress(packed.read_bytes()))
    return folder


def own_ids(row: tuple[list[int], list[bool]]) -> list[int]:
    return [i for i, own in zip(*row, strict=True) if own]


def test_mistral_tokens_and_the_span_that_is_averaged(mistral):
    tokenizer = load_tokenizer(mistral)
    [row] = tokenize(tokenizer, ["Hello world"], 512)
    assert row[0] == [1, 22557, 1526] and own_ids(row) == [22557, 1526]
    assert tokenizer.token_to_id("_") == 28730
    [row] = tokenize(tokenizer, ["</s> x"], 512)
    assert 2 not in row[0], "the name of a special token in a text is text"


def test_the_mistral_template_is_attended_to_and_its_closing_marker_averaged(mistral):
    opening, closing = [733, 16289, 28793], [733, 28748, 16289, 28793]  # [INST], [/INST]
    tokenizer = load_tokenizer(mistral, "mistral")
    [row] = tokenize(tokenizer, ["Hello world"], 512)
    assert row[0] == [1, *opening, 22557, 1526, *closing]
    assert row[0] == load_tokenizer(mistral).encode("[INST] Hello world [/INST]").ids
    assert own_ids(row) == [22557, 1526, *closing]
    [row] = tokenize(tokenizer, ["Hello"], 512, instruction="Find this:")
    assert row[0] == load_tokenizer(mistral).encode("[INST] Find this:\nHello [/INST]").ids
    assert own_ids(row) == [16230, *closing]
    [row] = tokenize(tokenizer, ["Hello world and much more than fits"], 10)
    assert row[0] == [1, *opening, 22557, 1526, *closing]
    with pytest.raises(ValueError, match="max_length 8 leaves no room"):
        tokenize(tokenizer, ["Hello"], 8)


def test_the_llama_3_template_is_made_of_special_tokens(tmp_path):
    words = ["<|begin|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {word: i for i, word in enumerate([*words, *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocab, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.add_special_tokens(words)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<|begin|> $A", special_tokens=[("<|begin|>", 0)]
    )
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    around = load_tokenizer(tmp_path, "llama-3")
    [(ids, own)] = tokenize(around, ["a<|eot_id|>"], 512)
    text = [vocab[letter] for letter in "a<|eot_id|>"]
    user, line = [vocab[letter] for letter in "user"], vocab["Ċ"]
    assert ids == [0, 1, *user, 2, line, line, *text, 3]
    assert own == [False] * 9 + [True] * (len(text) + 1)


def test_a_template_is_recorded_in_the_saved_folder(folder, mistral, tmp_path):
    shutil.copy(mistral / "tokenizer.json", folder)
    edit(folder / "config.json", vocab_size=32000)
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        break_tensor(folder, lambda s, name=name: s.update({name: torch.randn(32000, 16)}))
    model = LLM2Vec.from_pretrained(folder, template="mistral")
    model.save(tmp_path / "out")
    again = LLM2Vec.from_pretrained(tmp_path / "out")
    assert np.array_equal(model.encode(["Hello world"]), again.encode(["Hello world"]))
    assert not (tmp_path / "out" / "modules.json").exists()
    with pytest.raises(ValueError, match="has a chat template already"):
        LLM2Vec.from_pretrained(tmp_path / "out", template="mistral")
    with pytest.raises(ValueError, match="template 'gpt'"):
        LLM2Vec.from_pretrained(folder, template="gpt")


def test_a_tokenizer_without_bos_may_have_one_in_front_and_keeps_it(tmp_path, mistral):
    model = LLM2Vec.from_pretrained(TINY, template="endoftext")
    [(ids, own)] = tokenize(model.tokenizer, ["A text of its own"], 16)
    plain = model.tokenizer.encode("A text of its own", add_special_tokens=False).ids
    assert ids == [model.tokenizer.token_to_id("<|endoftext|>"), *plain]
    assert own == [False] + [True] * len(plain)
    model.save(tmp_path / "out")
    vectors = model.encode(["A text of its own", "and one more"])
    again = LLM2Vec.from_pretrained(tmp_path / "out").encode(["A text of its own", "and one more"])
    np.testing.assert_array_equal(vectors, again)
    prompts = json.loads((tmp_path / "out" / "config_sentence_transformers.json").read_text())
    assert prompts["default_prompt_name"] == "default", "which keeps BOS out of the mean there too"
    with pytest.raises(ValueError, match=r"tokenizer.json: has no token <\|endoftext\|>"):
        load_tokenizer(mistral, "endoftext")
