"""data/prepare.py: tokenizers, documents, splits, files, and every way it can go wrong."""
import contextlib
import gzip
import hashlib
import itertools
import json
import math
import os
import random
import runpy
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from data import prepare as P, units
from data.prepare import UserError

SHARED = Path(os.environ.get("TEXT_DIFFUSION_DATA") or ROOT.parent / "shared" / "data")
needs_shared = pytest.mark.skipif(not (SHARED / "gpt2_merges.txt").exists(),
                                  reason="needs real text: set TEXT_DIFFUSION_DATA")
SCRIPT = str(ROOT / "data" / "prepare.py")
UNICODE = ["Héllo, wörld! It's 3:45pm -- naïve café.", "日本語 русский हिन्दी العربية",
           "👩\u200d👩\u200d👧 🏳\ufe0f\u200d🌈\t\n\n  x ", "\x00\x7f\u200b\ufeff a\r\nb",
           "<|endoftext|> [SEP] </s>", " ", "\n\n", "a" * 3000]
WORDS = "the a cat dog sat ran on under mat hill and then saw big small red blue it was".split()


def sentence(seed, n=12):
    rng = random.Random(seed)
    return f"Story {seed}: " + " ".join(rng.choice(WORDS) for _ in range(n)) + "."


@pytest.fixture(scope="module")
def stories(tmp_path_factory):
    """A .txt of 1500 marked documents, some of them twice."""
    path = tmp_path_factory.mktemp("text") / "stories.txt"
    docs = [sentence(i if i % 5 else i // 10) for i in range(1500)]
    path.write_text("\n<|endoftext|>\n".join(docs))
    return path, docs


@pytest.fixture
def cache(tmp_path):
    return tmp_path / "cache"


def texts(folder, split):
    tokens, offsets, _ = P.open_split(folder, split)
    tok = P.load_tokenizer(folder)
    assert offsets[0] == 0 and offsets[-1] == len(tokens) and offsets.dtype == np.int64
    docs = [tokens[a:b] for a, b in zip(offsets, offsets[1:])]
    assert all(doc[-1] == tok.eos and tok.eos not in doc[:-1] for doc in docs)
    return [tok.decode(doc) for doc in docs]


def leftovers(cache):
    """What a failed or running preparation has left: everything visible, and temporary folders."""
    return [p.name for p in Path(cache).glob("*") if p.name != ".locks"] if cache.is_dir() else []


def command(capsys, *args):
    """The script in this process, as `python data/prepare.py ARGS`: exit code, stdout, stderr."""
    argv, sys.argv = sys.argv, [SCRIPT, *map(str, args)]
    try:
        runpy.run_path(SCRIPT, run_name="__main__")
        code = 0
    except SystemExit as e:
        code = e.code
    finally:
        sys.argv = argv
    out, err = capsys.readouterr()
    return code, out, err


def start(*args, **env):
    return subprocess.Popen([sys.executable, SCRIPT, *map(str, args)], text=True, cwd="/",
                            env={**os.environ, **env}, stdout=subprocess.PIPE,
                            stderr=subprocess.PIPE,     # SIGINT may be ignored where tests run
                            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL))


# ---- tokenizers --------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def gpt2_cache(tmp_path_factory):
    """tiktoken's cache, filled from the shared vocabulary; tiktoken itself checks their sha256."""
    folder = tmp_path_factory.mktemp("tiktoken")
    files = {"vocab.bpe": b"#version: 0.2\n" + (SHARED / "gpt2_merges.txt").read_bytes(),
             "encoder.json": (SHARED / "gpt2_vocab.json").read_bytes()}
    for name, data in files.items():
        (folder / hashlib.sha1((P.GPT2_URL + name).encode()).hexdigest()).write_bytes(data)
    return folder


@pytest.fixture
def gpt2(gpt2_cache, monkeypatch):
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(gpt2_cache))
    return lambda n=0: P.get_tokenizer("gpt2", n)


def bert_like(folder):
    """A small WordPiece tokenizer with [CLS], [SEP], [PAD], as bert-base-uncased has them."""
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers
    letters = [chr(c) for c in range(33, 127)]
    vocab = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *letters, *("##" + c for c in letters)]
    tok = Tokenizer(models.WordPiece({t: i for i, t in enumerate(vocab)}, unk_token="[UNK]",
                                     max_input_chars_per_word=10_000))
    tok.normalizer, tok.decoder = normalizers.BertNormalizer(), decoders.WordPiece()
    tok.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tok.add_special_tokens(vocab[:5])
    tok.enable_truncation(4)
    tok.enable_padding(length=4)
    tok.save(str(folder / "tokenizer.json"))
    return f"hf:{folder}"


def round_trip(tok):
    for text in UNICODE:
        ids = tok.encode(text)
        assert all(0 <= i < tok.vocab_size for i in ids) and not {tok.eos, tok.bos} & set(ids)
        assert tok.decode(ids) == text
        parts = [tok.decode_bytes(ids[i:i + 3]) for i in range(0, len(ids), 3)]
        assert b"".join(parts) == text.encode()     # also where a character is cut
        assert tok.decode([tok.bos, *ids, tok.eos, tok.pad, tok.pad]) == text
        assert tok.decode(np.array([*ids, tok.eos], np.uint16)) == text
    assert tok.encode_batch(UNICODE) == [tok.encode(text) for text in UNICODE]
    assert tok.eos == tok.bos == tok.vocab_size - 1 and tok.pad == tok.vocab_size
    assert tok.decode(range(tok.vocab_size)) is not None     # lone bytes do not raise


@pytest.mark.parametrize("kind, size", [("byte", 257), ("bpe", 300),
                                        ("char", len(set("".join(UNICODE))) + 1)])
def test_round_trip_and_reload(kind, size, tmp_path):
    """Also: made twice, it is the same, and made of other text another one."""
    make = {"byte": lambda: P.get_tokenizer("byte"), "char": lambda: P.char_tokenizer(UNICODE),
            "bpe": lambda: P.train_bpe(map(sentence, range(200)), 300)}
    tok = make[kind]()
    assert tok.vocab_size == size and make[kind]().fingerprint == tok.fingerprint
    round_trip(tok)
    tok.save(tmp_path)
    again = P.load_tokenizer(tmp_path)
    assert again.fingerprint == tok.fingerprint
    assert again.encode_batch(UNICODE) == tok.encode_batch(UNICODE)
    other = P.train_bpe((sentence(i)[::-1] for i in range(200)), 300)
    assert other.fingerprint != tok.fingerprint


def test_char_ids_are_the_characters_in_order(tmp_path):
    tok = P.char_tokenizer(iter(["cab", "", "äb\n"]))
    assert tok.encode("\nabcä") == [0, 1, 2, 3, 4] and (tok.eos, tok.pad) == (5, 6)
    tok.save(tmp_path)
    for text, named in ("axa", ["'x'"]), ("yb\0", [r"'\x00'", "'y'"]):
        with pytest.raises(UserError) as e:
            P.load_tokenizer(tmp_path).encode(text)
        assert "not " + ", ".join(named) + ": leave these out" in str(e.value)


def test_char_has_the_characters_of_all_splits(tmp_path, cache):
    """A character that only val or test has is neither dropped nor a crash."""
    docs = ["text " + chr(0x4e00 + i) for i in range(300)]      # each has one of its own
    (tmp_path / "own.txt").write_text(P.END.join(docs))
    folder = P.prepare(tmp_path / "own.txt", "char", cache=cache, quiet=True)
    assert sorted(sum((texts(folder, s) for s in P.SPLITS), [])) == docs
    assert P.load_tokenizer(folder).vocab_size == 300 + len(set("text ")) + 1


@needs_shared
def test_gpt2_ids_are_those_of_an_independent_implementation(gpt2, tmp_path):
    from tokenizers import Tokenizer, models, pre_tokenizers
    files = str(SHARED / "gpt2_vocab.json"), str(SHARED / "gpt2_merges.txt")
    other = Tokenizer(models.BPE.from_file(*files))
    other.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tok = gpt2()
    real = [(SHARED / f"{n}.txt").read_text()[:30_000] for n in ("tinystories", "wikitext2")]
    assert tok.encode_batch(UNICODE + real) == [other.encode(t).ids for t in UNICODE + real]
    assert (tok.vocab_size, tok.eos, tok.pad) == (50257, 50256, 50257)
    assert tok.encode("Hello world") == [15496, 995]
    round_trip(tok)
    tok.save(tmp_path)
    assert P.load_tokenizer(tmp_path).fingerprint == tok.fingerprint


@needs_shared
def test_gpt2_truncated_is_a_prefix_of_gpt2(gpt2):
    """The same ids where they are all in it, shorter pieces elsewhere."""
    full, small = gpt2(), gpt2(1000)
    assert small.vocab_size == 1000 and small.eos == 999
    words = [" " + w for w in (SHARED / "tinystories.txt").read_text()[:60_000].split()]
    pairs = list(zip(full.encode_batch(words), small.encode_batch(words)))
    same = [short == ids for ids, short in pairs if max(ids) < 999]
    longer = [len(short) > len(ids) for ids, short in pairs if max(ids) >= 999]
    assert all(same + longer) and len(same) > 100 and len(longer) > 100
    round_trip(small)
    assert gpt2(257).vocab_size == 257 and small.fingerprint != gpt2(1001).fingerprint


@needs_shared
def test_gpt2_ids_of_long_white_space(gpt2):
    """Those of tiktoken, which has no stack for a million line ends."""
    tok = gpt2()
    for space, end in itertools.product([" ", "\n", "\t \u3000\n"], ["", "x", " x", "\x1c", "'s"]):
        long = f"a b\n{space * 12_000} c{space * 15_000}{end}"
        assert tok.encode(long) == tok.bpe.encode_ordinary(long)
    long += "\n" * 1_000_000
    assert tok.decode(tok.encode(long)) == long


def test_a_bpe_of_unbroken_text_takes_no_time():
    """Before: minutes; words are cut where the trainer sees them, and nowhere else."""
    begin = time.process_time()
    dna = "".join(random.Random(0).choices("ACGT", k=200_000))
    tok = P.train_bpe([dna, "a" * 1_000_000, " " * 1_000_000], 400)
    assert len(tok.encode(dna)) < 70_000 and tok.decode(tok.encode(dna)) == dna
    assert time.process_time() - begin < 6      # measured: 0.6 s


def test_hub_tokenizer_from_a_local_file(tmp_path, stories, cache):
    spec = bert_like(tmp_path)
    tok = P.get_tokenizer(spec)
    assert (tok.pad, tok.bos, tok.eos) == (0, 2, 3)
    ids = tok.encode("The [SEP] cat. " * 9)
    assert len(ids) > 100 and not {0, 2, 3} & set(ids)   # no truncation, no specials from text
    assert len(tok.encode("cat")) == 3 and tok.decode([2, *tok.encode("cat"), 3, 0, 0]) == "cat"
    folder = P.prepare(stories[0], spec, max_docs=60, cache=cache, quiet=True)
    assert texts(folder, "train")[0] == "story 0 : " + sentence(0)[9:-1] + "."
    (tmp_path / "tokenizer.json").write_text((tmp_path / "tokenizer.json").read_text()
                                             .replace('"##~"', '"##~~"'))
    assert P.prepare(stories[0], spec, max_docs=60, cache=cache, quiet=True) != folder


def word_level(folder, words):
    """A tokenizer whose vocabulary holds its special tokens as ordinary words."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    vocab = {word: i for i, word in enumerate(words.split())}
    tok = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    tok.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    folder.mkdir()
    tok.save(str(folder / "tokenizer.json"))
    return P.get_tokenizer(f"hf:{folder}")


def test_a_text_that_spells_a_special_token_has_none(tmp_path):
    tok = word_level(tmp_path / "a", "</s> <s> <pad> <unk> the cat sat")
    assert (tok.eos, tok.bos, tok.pad) == (0, 1, 2)
    assert tok.encode_batch(["the </s> cat <s>", "<pad> sat"]) == [[4, 3, 5, 3], [3, 6]]
    tok = word_level(tmp_path / "b", "</s> the cat")  # nothing to put in its place
    assert tok.encode("the cat") == [1, 2]
    for text, said in (("the </s> cat", "spells a special token"), ("a dog", "cannot encode")):
        with pytest.raises(UserError, match=said):
            tok.encode(text)


def test_a_tokenizer_that_drops_characters_is_refused(tmp_path):
    from tokenizers import Tokenizer, models
    for folder, model in (("a", models.BPE({"</s>": 0, "a": 1}, [])),
                          ("b", models.BPE({"</s>": 0, "a": 1, "?": 2}, [], unk_token="?"))):
        (tmp_path / folder).mkdir()
        Tokenizer(model).save(str(tmp_path / folder / "tokenizer.json"))
    with pytest.raises(UserError, match="drops the characters that it does not know"):
        P.get_tokenizer(f"hf:{tmp_path}/a")
    assert P.get_tokenizer(f"hf:{tmp_path}/b").encode("aé") == [1, 2]


def test_ids_above_65535_are_stored_in_32_bits(tmp_path, stories, cache):
    from tokenizers import Tokenizer, models, pre_tokenizers
    words = {w for i in range(1500) for w in sentence(i).split()}
    vocab = {"</s>": 0, "<unk>": 1, **{w: 70_000 + i for i, w in enumerate(sorted(words))}}
    tok = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    tok.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tok.save(str(tmp_path / "tokenizer.json"))
    folder = P.prepare(stories[0], f"hf:{tmp_path}", max_docs=100, cache=cache, quiet=True)
    assert P.open_split(folder, "train")[0].dtype == np.uint32
    assert texts(folder, "val")[0] in stories[1]


# ---- documents, splits, files ------------------------------------------------------------------

def test_files_hold_every_document_once_and_meta_tells_the_truth(stories, cache):
    path, docs = stories
    folder = P.prepare(path, vocab_size=400, cache=cache, quiet=True)
    meta = json.loads((folder / "meta.json").read_text())
    found = {split: texts(folder, split) for split in P.SPLITS}
    assert sorted(sum(found.values(), [])) == sorted(docs)
    assert found["train"] == [d for d in docs if d in set(found["train"])]   # order is kept
    for split, n in meta["splits"].items():
        data = (folder / f"{split}.bin").read_bytes()
        assert hashlib.sha256(data).hexdigest() == n["sha256"] and len(data) == 2 * n["tokens"]
        assert n["documents"] == len(found[split])
        assert n["bytes"] == sum(len(t.encode()) for t in found[split])
        assert n["longest"] == np.diff(P.open_split(folder, split)[1]).max()
        p = np.unique(np.frombuffer(data, np.uint16), return_counts=True)[1] / n["tokens"]
        assert n["unigram_entropy"] == pytest.approx(-sum(x * math.log(x) for x in p), abs=1e-9)
    tok = P.load_tokenizer(folder)
    assert meta["fingerprint"] == tok.fingerprint
    assert (meta["vocab_size"], meta["dtype"]) == (400, "uint16")
    assert P.open_split(folder, "val")[2] is None
    assert P.prepare(str(path), "bpe", 400, cache=cache) == folder


def test_split_depends_on_the_text_alone(stories, cache, tmp_path):
    path, docs = stories
    folder = P.prepare(path, "byte", cache=cache, quiet=True)
    held = {split: set(texts(folder, split)) for split in P.SPLITS}
    n = len(set(docs))
    assert P._hash("ä") == int(hashlib.sha256("ä".encode()).hexdigest()[:16], 16)
    assert sum(len(h) for h in held.values()) == len(set.union(*held.values())) == n < len(docs)
    cut = P._cuts(P.find_source(str(path)))
    many = [P._split(f"text {i}", cut) for i in range(20_000)]
    for split in ("val", "test"):   # 2 % of many documents, 5 sigma
        assert abs(many.count(split) - 400) < 5 * (0.02 * 0.98 * 20_000) ** 0.5
    other = tmp_path / "other.txt"
    shuffled = docs + [sentence(i) for i in range(5000, 5300)]
    random.Random(0).shuffle(shuffled)
    other.write_text("<|endoftext|>".join(shuffled))
    again = P.prepare(other, "byte", cache=cache, quiet=True)
    for split in P.SPLITS:
        assert held[split] <= set(texts(again, split))


def read(path, *more):
    return [text for _, text, _ in P.find_source(str(path), *more).read() if text]


def test_txt_documents(tmp_path):
    marked = tmp_path / "marked.txt"
    marked.write_bytes(b"\xef\xbb\xbfone\r\n\r\nstill one\r\n<|endoftext|>\r\n\r\ntwo <|endoftext|>"
                       b"<|endoftext|>three" + b"\n\nthree" * 1000)
    assert read(marked) == ["one\n\nstill one", "two", "three" + "\n\nthree" * 1000]
    assert read(marked, 2) == ["one\n\nstill one"] + ["two"]
    folder = tmp_path / "folder"
    (folder / "deep").mkdir(parents=True)
    (folder / "a.txt").write_text("first\n\nfile")
    (folder / "deep" / "b.TXT").write_text("second<|endoftext|>third")
    (folder / "README.md").write_text("not a document")
    assert read(folder) == ["first\n\nfile", "second", "third"]


def test_every_line_a_document(tmp_path, cache):
    path, more = tmp_path / "a.txt", tmp_path / "b.txt"
    more.write_text("\n".join(map(sentence, range(90))) + "\n")
    path.write_bytes(b"\xef\xbb\xbfone\r\n\r\n  two \n \t\n3<|endoftext|>four\n<|endoftext|>\nfive")
    lines = ["one", "  two ", "3", "four", "five"]
    assert read(path, 0, "lines") == lines and read(path, 2, "lines") == lines[:2]
    assert read(tmp_path, 0, "lines") == lines + read(more, 0, "lines") != read(tmp_path)
    for at in range(P.WHOLE - 14, P.WHOLE + 2):     # a mark where the blocks of 1 MB meet
        path.write_text("x" * at + P.END + "y\nz")
        assert read(path, 0, "lines") == ["x" * at, "y", "z"]
    folder = P.prepare(more, "byte", cache=cache, quiet=True, split="lines")
    assert sorted(sum((texts(folder, s) for s in P.SPLITS), [])) == sorted(map(sentence, range(90)))
    more.write_text(P.END.join(map(sentence, range(90))))
    assert len({P.prepare(more, "byte", cache=cache, quiet=True, split=split)
                for split in ("auto", "lines")}) == 2       # two folders of the same file


def test_running_text_is_cut_at_blank_lines_and_loses_nothing(tmp_path):
    paragraphs = ["\n".join(sentence(100 * i + j) for j in range(1 + i % 7)) for i in range(4000)]
    path = tmp_path / "running.txt"
    path.write_text("\n \n".join(paragraphs))
    docs = read(path)
    assert all(2000 <= len(d) < 2700 for d in docs[:-1]) and len(docs) > 300
    assert "".join("".join(docs).split()) == "".join("".join(paragraphs).split())
    assert all(doc.startswith("Story") and doc.endswith(".") for doc in docs)
    path.write_text(" ".join(sentence(i) for i in range(3000)))     # one line: cut at spaces
    assert all(2000 <= len(d) < 2020 for d in read(path)[:-1])
    path.write_text("x" * 30_000)
    assert "".join(read(path)) == "x" * 30_000 and max(map(len, read(path))) == 8000


def test_more_than_a_megabyte_without_a_mark_is_running_text(tmp_path):
    long = "\n\n".join(sentence(i) for i in range(40_000))
    assert len(long) > 2 * P.WHOLE
    path, two = tmp_path / "mixed.txt", "two" + "\n\ntwo" * 1000
    path.write_text(P.END.join(["one", long, two, long[:-1], "three"]))
    docs = read(path)
    assert docs[0] == "one" and docs[-1] == "three" and docs.count(two) == 1
    middle = docs[1:docs.index(two)]
    assert len(middle) > 500 and "\n\n".join(middle) == long    # also where the blocks of 1 MB meet
    assert not any("endoftext" in d for d in docs)


def test_jsonl_parquet_saved_and_hub_layout_give_the_same_documents(tmp_path, cache):
    import datasets
    docs = [sentence(i) + "\n<|endoftext|> inside" for i in range(120)]
    data = datasets.Dataset.from_dict({"id": list(range(120)), "text": docs})
    one, two = tmp_path / "one.jsonl", tmp_path / "two"
    (two / "deep").mkdir(parents=True)
    one.write_text("".join(json.dumps({"text": d, "source": "x"}) + "\n" for d in docs) + "\n")
    for i in (0, 1):    # the only string field
        rows = [json.dumps({"n": 1, "story": d}) for d in docs[60 * i:60 * i + 60]]
        (two / "deep" / f"{i}.jsonl").write_text("\n".join(rows))
    data.to_parquet(str(tmp_path / "data.parquet"))
    data.save_to_disk(str(tmp_path / "saved"))
    hub = tmp_path / "hub" / "data"
    hub.mkdir(parents=True)
    for i in (0, 1):
        shard = data.select(range(60 * i, 60 * i + 60))
        shard.to_parquet(str(hub / f"train-0000{i}-of-00002.parquet"))
    parts = dict(train=data.select(range(5)), extra=data.select(range(5, 120)))
    datasets.DatasetDict(parts).save_to_disk(str(tmp_path / "dict"))
    for path in (one, two, *(tmp_path / name for name in ("data.parquet", "saved", "hub", "dict"))):
        assert read(path) == docs and read(path, 7) == docs[:7]
    datasets.DatasetDict(train=data, test=data, extra=data).save_to_disk(str(tmp_path / "more"))
    with pytest.raises(UserError, match="has the splits train, test, extra: keep only train"):
        read(tmp_path / "more")
    folder = P.prepare(tmp_path / "saved", "byte", cache=cache, quiet=True)
    assert sorted(sum((texts(folder, s) for s in P.SPLITS), [])) == sorted(docs)


def test_a_dataset_with_validation_keeps_its_splits(tmp_path, cache):
    import datasets
    docs = [sentence(i) for i in range(300)]
    hub = tmp_path / "hub" / "data"
    hub.mkdir(parents=True)

    def write(split, docs):
        path = hub / f"{split}-00000-of-00001.parquet"
        datasets.Dataset.from_dict({"text": docs}).to_parquet(str(path))
    write("train", docs[:200])
    write("validation", docs[200:])
    folder = P.prepare(hub.parent, "byte", cache=cache, quiet=True)
    assert texts(folder, "train") == docs[:200]
    val, test = texts(folder, "val"), texts(folder, "test")
    assert sorted(val + test) == sorted(docs[200:]) and 25 < len(val) < 75
    (hub / "validation-00000-of-00001.parquet").rename(hub / "test-00000-of-00001.parquet")
    folder = P.prepare(hub.parent, "byte", cache=cache, quiet=True)     # halved the other way
    assert sorted(texts(folder, "val") + texts(folder, "test")) == sorted(docs[200:])
    write("test", docs[:1])
    with pytest.raises(UserError, match="has no document for (val|test): give more, or the files"):
        P.prepare(hub.parent, "byte", cache=cache, quiet=True)
    write("validation", docs[200:])
    write("test", ["t"] * 5)
    folder = P.prepare(hub.parent, "byte", cache=cache, quiet=True)
    assert texts(folder, "val") == docs[200:] and texts(folder, "test") == ["t"] * 5
    folder = P.prepare(hub.parent, "byte", max_docs=50, cache=cache, quiet=True)
    assert [len(texts(folder, s)) for s in P.SPLITS] == [50, 20, 5]


@pytest.mark.parametrize("files, got, note", [
    ("a[1].parquet test_notes.parquet my*train?.parquet valid.parquet README.md", 4, "README.md"),
    ("train.parquet notes.parquet test.parquet", 3, ""),
    ("a.txt .git/x.txt .ipynb_checkpoints/b.txt __MACOSX/c.txt ._x.txt .DS_Store b.txt.gz", 2, ""),
    ("a.jsonl b.jsonl.gz deep/c.jsonl c.csv d.json", 3, "c.csv and 1 more"),
    ("a.parquet n0.txt n1.txt", "1 .parquet (a.parquet) and 2 .txt (n0.txt ...): give one", ""),
    ("a.txt b.jsonl.gz", "1 .txt (a.txt) and 1 .jsonl (b.jsonl.gz): give one of these", ""),
    ("a.txt b.txt.zst", "b.txt.zst is packed in a way that is not read here: unpack it", ""),
    ("a.jsonl b.zip", "b.zip is packed in a way", ""), ("a.txt !c.txt.gz", "cannot read", "")])
def test_a_folder_is_read_whole_or_refused(files, got, note, tmp_path, monkeypatch):
    """Through links, whatever its path, its names and its README.md are, and without a home."""
    import pyarrow
    from pyarrow.parquet import write_table
    monkeypatch.setenv("HOME", "/nowhere")
    folder, docs = tmp_path / "a [b] * ?" / "data", []
    for name in files.split():
        path = folder / name.lstrip("!")
        path.parent.mkdir(parents=True, exist_ok=True)
        data, pack = f"text of {name}", gzip.compress if path.suffix == ".gz" else bytes
        docs += [data] if path.name[0] != "." else []
        if path.suffix == ".parquet":
            write_table(pyarrow.table({"text": [data]}), path)
        elif name == "README.md":
            path.write_text("---\nconfigs:\n- data_files: a.parquet\n---\n")
        else:
            data = json.dumps({"text": data}) if "json" in name else data
            path.write_bytes(b"torn" if name[0] == "!" else pack(data.encode()))
    (tmp_path / "link").mkdir()
    (tmp_path / "link" / "to").symlink_to(folder)
    (folder / "loop").symlink_to(tmp_path / "link")
    for path in (folder, tmp_path / "link"):
        if isinstance(got, str):
            with pytest.raises(UserError) as e:
                read(path)
            assert got in str(e.value).replace("(to/", "(")
        else:
            assert len(read(path)) == got and {*read(path)} <= {*docs}
            assert (P.find_source(str(path)).note or "").endswith(note)


def test_hub_names_ask_for_the_right_dataset(monkeypatch, cache):
    import datasets
    asked = []
    lines = ["", " = Cats = \n", "", " Cats are = = \n", " = = Food = = \n", " Mice . \n",
             " = Dogs of war = \n", " Dogs . \n", " = Owls = \n", " Owls . \n"]

    def load_dataset(path, name=None, streaming=False):
        asked.append((path, name, streaming))
        return datasets.DatasetDict({s: datasets.Dataset.from_dict({"text": lines})
                                     for s in ("train", "validation", "test")})
    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    monkeypatch.setattr(P, "_reachable", lambda url: True)
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    folder = P.prepare("wikitext2", "byte", cache=cache, quiet=True)
    assert texts(folder, "train") == ["= Cats = \n\n Cats are = = \n = = Food = = \n Mice .",
                                      "= Dogs of war = \n Dogs .", "= Owls = \n Owls ."]
    for name in ("tinystories", "openwebtext", "fineweb"):
        P.prepare(name, "byte", max_docs=8, cache=cache, quiet=True)
    assert set(asked) == {("Salesforce/wikitext", "wikitext-2-raw-v1", False),
                          ("roneneldan/TinyStories", None, False),
                          ("Skylion007/openwebtext", None, True),
                          ("HuggingFaceFW/fineweb", "sample-10BT", True)}


# ---- tales -------------------------------------------------------------------------------------

def test_tales(cache):
    from data.tales import Tales, stories
    folder = P.prepare("tales", max_docs=150, cache=cache, quiet=True)
    meta, tok = json.loads((folder / "meta.json").read_text()), P.load_tokenizer(folder)
    found = {split: texts(folder, split) for split in P.SPLITS}
    assert [len(t) for t in found.values()] == [150, 20, 20]
    assert len(set(sum(found.values(), []))) == 190     # nothing is shared between the splits
    told = [text for text, _ in stories(150, P.SEEDS["train"], start=0)]
    assert found["train"] == told                       # in the order of their numbers
    tales = Tales()
    for split in ("val", "test"):
        logp = P.open_split(folder, split)[2]
        assert logp.dtype == np.float64
        assert list(logp) == [tales.logp(text) for text in found[split]]
        n = meta["splits"][split]
        assert np.isclose(n["entropy_per_doc"], -logp.mean(), atol=1e-9)
        assert np.isclose(n["entropy_se"], np.std(logp, ddof=1) / 20 ** 0.5, atol=1e-9)
    assert P.open_split(folder, "train")[2] is None and meta["grammar"] == tales.version
    assert tok.fingerprint == P.load_tokenizer(P.TALES_BPE).fingerprint and tok.vocab_size == 2048
    assert 3.8 < meta["splits"]["train"]["bytes"] / meta["splits"]["train"]["tokens"] < 4.6
    assert all(n["longest"] <= 158 for n in meta["splits"].values())  # a row has 160


def test_the_stored_tokenizer_is_of_the_present_grammar():
    from data.tales import Tales
    assert json.loads(P.TALES_BPE.read_text())["grammar"] == Tales().version, \
        "data/tales.txt changed: run data.prepare.train_tales_tokenizer()"
    round_trip(P.load_tokenizer(P.TALES_BPE))


# ---- load_data ---------------------------------------------------------------------------------

def config(**more):
    return SimpleNamespace(**dict(data="tales", tokenizer="bpe", vocab_size=0, max_docs=0, eos=-1,
                                  split="auto", rows="auto", seq_len=8, bos=-1) | more)


@pytest.mark.parametrize("tokenizer, size", [("byte", 257), ("char", None)])
def test_load_data(tokenizer, size, stories, cache, monkeypatch):
    monkeypatch.setenv("TEXT_DIFFUSION_CACHE", str(cache))
    for asked, rows in ((dict(data="tales", max_docs=60), "docs"),
                        (dict(data=str(stories[0]), max_docs=60), "stream"),
                        (dict(data=str(stories[0]), rows="docs"), "docs")):
        cfg = config(tokenizer=tokenizer, **asked)
        for _ in range(2):      # the second time the config is filled in already
            data = P.load_data(cfg, quiet=True)
        folder = P.prepare(cfg.data, tokenizer, 0, cfg.max_docs, quiet=True)
        n = size or len(set("".join(sum((texts(folder, s) for s in P.SPLITS), [])))) + 1
        assert (cfg.vocab_size, cfg.eos, cfg.bos, cfg.rows) == (n, n - 1, n - 1, rows)
        assert data.tokenizer.fingerprint == P.load_tokenizer(folder).fingerprint
        for split in P.SPLITS:
            assert all(map(np.array_equal, getattr(data, split), P.open_split(folder, split)))
        counts = np.bincount(data.val[0])[np.unique(data.val[0])] / len(data.val[0])
        assert data.unigram_entropy == pytest.approx(-(counts * np.log(counts)).sum())
    for wrong, said in ((dict(vocab_size=300), f"does not suit the tokenizer {tokenizer}: leave"),
                        (dict(split="words"), "unknown --split 'words'")):
        with pytest.raises(UserError, match=said):
            P.load_data(config(data=str(stories[0]), tokenizer=tokenizer, **wrong), quiet=True)


@pytest.mark.parametrize("docs, said", [
    ([f"text {i}" for i in range(5)] * 300, None), (["same"] * 2000 + list("abcdef") * 9, None),
    (["one", "two", "three"], None), (list("abcdefgh"), None), (["\n"] * 3 + list("ab"), None),
    (["only one document"], "1 different document.*or a .txt by --split lines"),
    (["same"] * 1500, "1 different document.*: give more text"), ([""] * 4, "is empty: give a")])
@pytest.mark.parametrize("tokenizer", ["bpe", "byte", "char"])
def test_few_or_short_documents(docs, said, tokenizer, tmp_path, cache, monkeypatch):
    """They are trained on in rows of documents; rows of a stream may be too long for them."""
    monkeypatch.setenv("TEXT_DIFFUSION_CACHE", str(cache))
    path = tmp_path / "few.jsonl"
    path.write_text("".join(json.dumps({"text": doc}) + "\n" for doc in docs))
    with pytest.raises(UserError, match=said) if said else contextlib.nullcontext():
        P.load_data(config(data=str(path), tokenizer=tokenizer, rows="docs"), True)
        [folder] = cache.glob("few*")
        assert sorted(sum((texts(folder, split) for split in P.SPLITS), [])) == sorted(docs)
        with pytest.raises(UserError, match="smaller --seq-len, more text or --rows docs"):
            P.load_data(config(data=str(path), tokenizer=tokenizer, seq_len=6000), True)


def test_bits_per_byte_of_rows_that_cut_characters():
    x0 = torch.tensor([*("日本語" * 40).encode()]).view(9, 40)
    row = units.likelihood(torch.ones(9), x0, None, P.get_tokenizer("byte"), config(), "exact")
    assert row["bits_per_byte"] == pytest.approx(9 / math.log(2) / 360)


@pytest.mark.parametrize("split, tokens, said", [
    ("train", 30, "the training split has 30 tokens, not more than"),
    ("train", 29, "the training split has 29 tokens, fewer than --seq-len 30: use a smaller"),
    ("val", 29, "the val split has 29 tokens, fewer than --seq-len 30"), ("test", 30, None)])
def test_load_data_refuses_splits_shorter_than_a_row(split, tokens, said, stories, cache,
                                                     monkeypatch):
    """Of running text; documents are filled up."""
    def short(folder, name):
        return [np.zeros(tokens if name == split else 99, np.uint16), None, None]
    monkeypatch.setenv("TEXT_DIFFUSION_CACHE", str(cache))
    monkeypatch.setattr(P, "open_split", short)
    cfg = dict(data=str(stories[0]), tokenizer="byte", seq_len=30)
    P.load_data(config(rows="docs", **cfg), True)
    with pytest.raises(UserError, match=said) if said else contextlib.nullcontext():
        P.load_data(config(**cfg), quiet=True)


# ---- what goes wrong ---------------------------------------------------------------------------

def test_wrong_input_is_one_sentence_and_leaves_nothing(tmp_path, cache, capsys, monkeypatch):
    """Exit code 2, one line on stderr that names what is wrong and what to do, no folder."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path / "no-tiktoken"))
    monkeypatch.setattr("requests.head", lambda *a, **k: (_ for _ in ()).throw(
        __import__("requests").ConnectionError()))
    late = b"".join(b'{"text": "document %d"}\n' % i for i in range(2000)) + b"{"
    files = {"good.txt": b"one<|endoftext|>two<|endoftext|>three", "empty.txt": b"",
             "blank.txt": b" \n\n ", "late.jsonl": late,
             "latin.txt": b"x" * 1_500_000 + "é".encode() + b"caf\xe9 au lait",
             "cut.txt": b"ab\xc3", "short.txt": b"only one document",
             "field.jsonl": b'{"text": "a"}\n\n{"a": "b", "c": "d"}\n', "list.jsonl": b"[1, 2]\n",
             "number.jsonl": b'{"text": 3}', "false.jsonl": b'{"text": false}',
             "torn.parquet": b"PAR1 nothing", "table.csv": b"a,b",
             "words.json": b"{}", "file": b"a file where the cache should be"}
    for name, data in files.items():
        (tmp_path / name).write_bytes(data)
    (tmp_path / "folder").mkdir()
    (tmp_path / "links").mkdir()
    (tmp_path / "links" / "a.txt").symlink_to("nowhere")
    (tmp_path / "circle").symlink_to("circle")
    cases = [
        ("@links", ["links/a.txt is no file or a link to nothing"]), ("~no.one/a.txt", ["~no.one"]),
        ("@missing.txt", ["missing.txt", "tinystories", "wikitext2", "openwebtext", "fineweb"]),
        ("@empty.txt", ["empty.txt is empty"]), ("@blank.txt", ["blank.txt is empty"]),
        ("@folder", ["folder is no text", ".jsonl"]), ("@table.csv", ["table.csv is no text"]),
        ("@latin.txt", ["latin.txt is not UTF-8 at byte 1500005"]),
        ("@cut.txt", ["cut.txt is not UTF-8 at byte 2"]),
        ("@short.txt", ["1 different document", "one each"]),
        ("@late.jsonl", ["line 2001 of", "late.jsonl is not JSON"]),
        ("@field.jsonl", ["line 3 of", "field.jsonl has no text"]),
        ("@list.jsonl", ["line 1 of", "list.jsonl has no text"]),
        ("@number.jsonl", ["line 1 of", "number.jsonl has no text"]),
        ("@false.jsonl", ["line 1 of", "false.jsonl has no text"]),
        ("@circle", ["neither a file or folder"]),
        ("@good.txt --tokenizer hf:", ["names no tokenizer.json"]),
        ("@good.txt --tokenizer hf:@folder", ["names no tokenizer.json"]),
        ("@torn.parquet", ["cannot read", "torn.parquet"]),
        ("@good.txt --vocab-size 256", ["--vocab-size 256", "257"]),
        ("@good.txt --tokenizer gpt2 --vocab-size 50258", ["50258", "50257"]),
        *((f"@good.txt --tokenizer {name} --vocab-size 300", ["300", "leave it out"])
          for name in ("byte", "hf:x", "char")),
        ("@good.txt --tokenizer spm", ["unknown tokenizer 'spm'", "byte, char"]),
        ("@good.txt --split words", ["unknown --split 'words': choose auto or lines"]),
        ("@field.jsonl --split lines", ["field.jsonl holds .jsonl files: leave it out"]),
        ("tales --split lines", ["--split lines is for .txt files, and tales is none"]),
        ("fineweb --split lines", ["--split lines is for .txt files, and fineweb"]),
        ("@good.txt --max-docs few", ["invalid int value: 'few'"]),
        ("@good.txt --tokenizer hf:@words.json", ["cannot load the tokenizer"]),
        ("@good.txt --tokenizer hf:no/such", ["cannot load the tokenizer no/such"]),
        ("@good.txt --tokenizer gpt2", ["TIKTOKEN_CACHE_DIR", P.GPT2_URL + "vocab.bpe",
                                        "6d1cbeee0f20b3d9449abfede4726ed8212e3aee"]),
        ("@good.txt --max-docs -1", ["--max-docs -1 is negative"]),
        ("@good.txt --max-docs 2", ["2 different document"]),
        ("fineweb", ["HuggingFaceFW/fineweb", "python data/prepare.py fineweb", "HF_HOME"]),
        ("@good.txt --cache @file", [f"{tmp_path}/file", "TEXT_DIFFUSION_CACHE"])]
    for args, words in cases:
        args = args.replace("@", f"{tmp_path}/").split()
        code, out, err = command(capsys, "--cache", cache, *args)
        err = err.removeprefix("training a BPE of 2048 ids\n")
        assert code == 2 and out == "", (args, code, out, err)
        assert err.count("\n") == 1 and err.startswith("error: "), (args, err)
        assert all(word in err for word in words), (args, err)
        assert not leftovers(cache), (args, leftovers(cache))


@pytest.mark.parametrize("fcntl", ["", "raise ImportError"])    # is missing on Windows
def test_the_command_line_as_a_user_runs_it(fcntl, stories, cache, tmp_path):
    """Two processes at once make one dataset; a hub name without a network fails at once."""
    (tmp_path / "fcntl.py").write_text(fcntl)
    env = dict(PYTHONPATH=str(tmp_path), PYTHONWARNINGS="ignore") if fcntl else {}
    both = [start(stories[0], "--vocab-size", "300", "--cache", cache, **env) for _ in range(2)]
    hub = start("tinystories", "--cache", cache, HF_ENDPOINT="http://127.0.0.1:9",
                HF_HUB_OFFLINE="", HF_HOME=str(cache / ".hf"), **env)
    outs = [p.communicate(timeout=600) for p in both]
    assert [p.returncode for p in both] == [0, 0], outs
    assert outs[0][0] == outs[1][0] and "first: Story" in outs[0][0]
    assert "bytes/token" in outs[0][0] and "unigram entropy of val " in outs[0][0]
    out, err = hub.communicate(timeout=600)
    assert hub.returncode == 2 and out == "" and err.count("\n") == 1, err    # and no retries
    assert "roneneldan/TinyStories" in err and "python data/prepare.py tinystories" in err
    assert len([n for n in leftovers(cache) if n != ".hf"]) == 1
    P.verify(outs[0][0].splitlines()[0])


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT])
def test_an_interrupted_preparation_leaves_nothing_that_looks_finished(how, tmp_path, cache):
    """Every document takes 10 ms here, so that there is something to interrupt."""
    (tmp_path / "text").mkdir()
    rows = [json.dumps({"text": sentence(i) * 20}) + "\n" for i in range(3000)]
    (tmp_path / "text" / "a.jsonl").write_text("".join(rows))
    slow = ("import signal, sys, time; sys.path.insert(0, sys.argv.pop(1))\n"
            "signal.signal(signal.SIGINT, signal.default_int_handler)  # may be ignored\n"
            "from data import prepare as P\n"
            "add = P.Writer.add\n"
            "def slowly(self, *a): add(self, *a); self.file.flush(); time.sleep(0.01)\n"
            "P.Writer.add = slowly; P.run_main(P.main)")
    process = subprocess.Popen(
        [sys.executable, "-c", slow, ROOT, tmp_path / "text", "--tokenizer", "byte", "--cache",
         cache], stderr=subprocess.PIPE, text=True)
    while not any(f.stat().st_size > 10_000 for f in cache.glob("*.partial/train.bin")):
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.02)
    process.send_signal(how)
    _, err = process.communicate(timeout=600)
    left = leftovers(cache)
    if how == signal.SIGINT:
        assert process.returncode == 130 and "Traceback" not in err and not left
    else:
        assert len(left) == 1 and left[0].endswith(".partial")
    (cache / "other.partial").mkdir(exist_ok=True)      # of some other dataset, long ago
    folder = P.prepare(tmp_path / "text", "byte", cache=cache, quiet=True)
    assert len(sum((texts(folder, s) for s in P.SPLITS), [])) == 3000
    assert leftovers(cache) == [folder.name]


def test_ctrl_c_is_heard_while_compiled_code_works(tmp_path, cache):
    """Training a BPE, which takes 8 seconds on a fast CPU."""
    words = random.Random(0).randbytes(6_000_000).hex().replace("a", " ")
    (tmp_path / "words.txt").write_text(words)
    process = start(tmp_path / "words.txt", "--vocab-size", "200000", "--cache", cache)
    assert process.stderr.readline() == "training a BPE of 200000 ids\n"
    time.sleep(1)
    process.send_signal(signal.SIGINT)
    begin = time.time()
    assert process.communicate(timeout=60)[1] == "interrupted\n" and process.returncode == 130
    assert time.time() - begin < 4 and not leftovers(cache)     # measured: 1.3 s


def test_killed_at_any_moment_the_next_start_makes_it_whole(stories, cache):
    """Also while others wait for it."""
    args = stories[0], "bpe", 300
    good = P.prepare(*args, cache=cache / "good", quiet=True)
    for moment in range(6):
        two = [start(args[0], "--vocab-size", "300", "--cache", cache / "bad") for _ in range(2)]
        time.sleep(0.3 + random.Random(moment).random() / 2)
        two[0].kill()
        assert two[1].communicate(timeout=60)[0] and two[0].communicate()
        folder = P.prepare(*args, cache=cache / "bad", quiet=True)
        assert leftovers(cache / "bad") == [good.name]
        for file in good.iterdir():
            assert file.read_bytes() == (folder / file.name).read_bytes()
        shutil.rmtree(folder)


def test_damaged_folders_are_noticed(stories, cache):
    folder = P.prepare(stories[0], "byte", cache=cache, quiet=True)
    P.verify(folder)

    def damaged(name, change):
        path = folder / name
        good = path.read_bytes()
        change(path)
        with pytest.raises(UserError) as e:
            P.prepare(stories[0], "byte", cache=cache, quiet=True)
        assert str(path) in str(e.value)
        assert f"delete the folder {folder} and run again" in str(e.value)
        path.write_bytes(good)
        P.verify(folder)

    def truncate(path):
        os.truncate(path, path.stat().st_size - 2)
    for name in ("train.bin", "val.bin", "test.bin", "train.idx.npy", "meta.json",
                 "tokenizer.json"):
        damaged(name, truncate)
        damaged(name, Path.unlink)
    damaged("tokenizer.json", lambda path: shutil.copy(P.TALES_BPE, path))
    damaged("train.idx.npy", lambda path: np.save(path, np.arange(5)))
    for old, new in ('"uint16"', '"O"'), ('"uint16"', '"int64"'), ('"byte"', "[" * 9999):
        damaged("meta.json", lambda path: path.write_text(path.read_text().replace(old, new)))


@pytest.mark.parametrize("spec, said", [
    (dict(kind="spm"), "unknown kind of tokenizer 'spm': it is byte"), ({}, "missing or broken"),
    ([[]], "missing or broken"), ("[" * 9999, "missing or broken")])
def test_a_wrong_tokenizer_file_is_one_sentence(spec, said, tmp_path):
    spec = {**P.get_tokenizer("byte").spec, **spec} if spec and isinstance(spec, dict) else spec
    (tmp_path / "tokenizer.json").write_text(spec if spec == "[" * 9999 else json.dumps(spec))
    with pytest.raises(UserError, match=said):
        P.load_tokenizer(tmp_path)


def test_memory_does_not_grow_with_the_text(tmp_path):
    """Peak memory while 30 MB become tokens, over that of 3 MB: the text is never held."""
    code = ("import sys, resource; sys.path.insert(0, sys.argv[1])\n"
            "from data.prepare import prepare\n"
            "grown = []\n"
            "for path in sys.argv[2:4]:\n"
            "    prepare(path, 'byte', cache=sys.argv[4], quiet=True)\n"
            "    grown.append(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)\n"
            "print(grown[1] - grown[0])")
    rng, paths = random.Random(0), [tmp_path / "small.txt", tmp_path / "large.txt"]
    for path, megabytes in zip(paths, (3, 30)):
        with open(path, "w") as f:
            for _ in range(megabytes):      # noise with spaces, no marks
                f.write(rng.randbytes(500_000).hex().replace("a", " ").replace("b0", "\n\n"))
    out = subprocess.run([sys.executable, "-c", code, ROOT, *paths, tmp_path / "cache"], check=True,
                         capture_output=True, text=True).stdout
    kilo = 1024 if sys.platform == "darwin" else 1
    assert int(out) / kilo < 20_000, f"{out} KB more for ten times the text"
