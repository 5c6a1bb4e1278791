"""Any text -> a folder of token files that the scripts read with numpy.memmap.

    python data/prepare.py NAME|PATH [--tokenizer T] [--vocab-size N] [--max-docs N]
                           [--split auto|lines] [--cache DIR]

NAME       tales (written here by data/tales.py), or from the Hugging Face hub tinystories,
           wikitext2, openwebtext, fineweb
PATH       a .txt, .jsonl (both also .gz) or .parquet file, a folder of them (recursive, through
           links, without hidden files; all of one kind), a folder written by
           `datasets.save_to_disk`, or a copy of a hub repository
           (data/train-00000-of-00002.parquet ...)
documents  .jsonl and .parquet: the field `text`, or the only string field. wikitext2: an article.
           .txt: what stands between two <|endoftext|>; in a folder, a small file. Running text (a
           file without marks, or more than 1 MB between two) is cut at the first blank line, or
           failing that line end, or space, between the characters 2000 and 8000.
           --split lines: every line of a .txt that is not blank is a document, as it stands.
split      by sha256 of the document: val 2 %, test 2 %, train 96 %, so equal documents stay
           together. Below 1000 different ones the smallest hashes make val and test, at least one
           each. A hub dataset that has train and validation or test (as splits, or as the names of
           all its files) keeps them; a missing one is half of the other, by hash. tales: one seed
           each.
tokenizer  bpe (byte-level, trained on train; 2048 ids), gpt2 (50257 ids; with --vocab-size N the
           first N - 1 ids of the same table, and EOS), byte, char (an id for each character of
           the text, all splits), hf:NAME or hf:PATH
folder     {train,val,test}.bin: the documents, each followed by EOS, as uint16 (uint32 above
           65535 ids); *.idx.npy: where they begin; tokenizer.json; meta.json (sizes, hashes, the
           unigram entropy of each split); for tales also {val,test}.logp.npy: the exact
           log-probability of each document in nats.
"""
import argparse
import base64
import contextlib
import gzip
import hashlib
import io
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import textwrap
import threading
from array import array
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from itertools import chain, groupby, islice
from pathlib import Path
from typing import Callable

import numpy as np
from filelock import FileLock, Timeout
from tqdm import tqdm

ROOT = Path(__file__).resolve().parent.parent
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))   # `python data/prepare.py` puts only data/ on the path
from data.files import UserError, run_main

FORMAT = 2                          # part of a folder's name: raise it when the files change
SPLITS = "train", "val", "test"
DTYPES = {"uint16": np.dtype("uint16"), "uint32": np.dtype("uint32")}
VAL = {"validation": "val", "valid": "val", "dev": "val"}   # other names of a split
END = "<|endoftext|>"
CHECKED = 1 << 30                   # bytes: larger files are not read whole at every start
WHOLE, SHORT, LONG = 1 << 20, 2000, 8000    # characters: see `documents` above
SAMPLE = 64 << 20                   # characters of train that a BPE is trained on
LONG_WORD = re.compile(r"(\S{256}|\s{256})")     # training a BPE is quadratic in the longest word
LONG_SPACE = re.compile("[\t-\r \x85\xa0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000]{9999,}")
TALES = {"train": 100_000, "val": 2000, "test": 2000}
SEEDS = {"train": 1, "val": 2, "test": 3, "tokenizer": 4}
TALES_BPE = Path(__file__).with_name("tales_bpe.json")
HUB = {  # name: repository, configuration, streamed
    "tinystories": ("roneneldan/TinyStories", None, False),
    "wikitext2": ("Salesforce/wikitext", "wikitext-2-raw-v1", False),
    "openwebtext": ("Skylion007/openwebtext", None, True),
    "fineweb": ("HuggingFaceFW/fineweb", "sample-10BT", True)}
FINEWEB_DOCS = 100_000              # about 70M GPT-2 tokens, of the 15M documents of the sample
PRINTED = [*range(33, 127), *range(161, 173), *range(174, 256)]     # bytes as ByteLevel spells
BYTES = {chr(b): b for b in PRINTED} | {                            # them: as itself, or from 256
    chr(256 + i): b for i, b in enumerate(b for b in range(256) if b not in PRINTED)}
GPT2_URL = "https://openaipublic.blob.core.windows.net/gpt-2/encodings/main/"


@contextlib.contextmanager
def hint(what, advice):
    """Turn what other libraries raise inside into one sentence: what failed, why, what to do."""
    try:
        yield
    except UserError:
        raise
    except Exception as e:
        why = textwrap.shorten(str(e), 160) or type(e).__name__
        raise UserError(f"{what} ({why}): {advice}") from None


def _run(work):
    """work(stopped) in a thread: the main one hears Ctrl-C while compiled code works, and then
    sets the event `stopped`."""
    done, stopped = Future(), threading.Event()

    def run():
        try:
            done.set_result(work(stopped))
        except BaseException as error:
            done.set_exception(error)
    threading.Thread(target=run, daemon=True).start()
    try:
        while not done.done():
            wait([done], 0.2)
    except BaseException:
        stopped.set()
        wait([done], 1)     # Python should not end while the thread comes back to it
        raise
    return done.result()


def sha(data):
    return hashlib.sha256(data).hexdigest()


def sha_of(path):
    """Sha256 of a file, read in blocks."""
    total = hashlib.sha256()
    with open(path, "rb") as file:
        for block in iter(lambda: file.read(1 << 20), b""):
            total.update(block)
    return total.hexdigest()


# ---- tokenizers --------------------------------------------------------------------------------

class Tokenizer:
    """Text <-> ids. A model predicts the ids 0 ... vocab_size - 1, `eos` among them. `bos` is an
    input only (our own tokenizers use eos for it, as GPT-2 does). `pad` is vocab_size, one past
    the end, unless the vocabulary has its own. `spec` (JSON) is all that defines the mapping and
    `fingerprint` its hash; its kind names what does the work: byte and char (Python), gpt2
    (`tiktoken`) or hf (`tokenizers`)."""

    def __init__(self, spec):
        self.spec, self.name, self.vocab_size = spec, spec["name"], spec["vocab_size"]
        self.eos, self.bos, self.pad = spec["eos"], spec["bos"], spec["pad"]
        self.kind, self.fingerprint = spec["kind"], fingerprint(spec)
        if self.kind == "char":
            self.ids = {char: i for i, char in enumerate(spec["characters"])}
        elif self.kind == "gpt2":
            import tiktoken
            ranks = {base64.b64decode(token): rank for rank, token in enumerate(spec["ranks"])}
            self.bpe = tiktoken.Encoding(self.name, pat_str=spec["pattern"],
                                         mergeable_ranks=ranks, special_tokens={END: self.eos})
        elif self.kind == "hf":
            import tokenizers
            self.bpe = tokenizers.Tokenizer.from_str(json.dumps(spec["tokenizer"]))
            self.bpe.encode_special_tokens = True   # "[SEP]" in a text must not end its document
            model = spec["tokenizer"]["model"]
            self.unk = model.get("unk_id", self.bpe.token_to_id(model.get("unk_token") or ""))
            self.bpe.no_truncation()
            self.bpe.no_padding()
        elif self.kind != "byte":
            raise UserError(f"unknown kind of tokenizer {self.kind!r}: it is byte, char, gpt2 or "
                            "hf; prepare the data again")

    def encode(self, text):
        """The ids of a text, never a special one, whatever the text spells."""
        try:
            text.encode()
        except UnicodeEncodeError:  # bytes of the command line that are none of its code
            raise UserError(f"{text!r} is not text: set a UTF-8 terminal, as LC_ALL=C.UTF-8 "
                            "does") from None
        return self.encode_batch([text])[0]

    def encode_batch(self, texts):
        if self.kind == "byte":
            return [list(text.encode()) for text in texts]
        if self.kind == "char":
            if unknown := sorted(set().union(*texts) - self.ids.keys()):
                raise UserError(f"the vocabulary holds the characters of the data, and not "
                                f"{str(unknown)[1:-1]}: leave these out of the prompt")
            return [[self.ids[char] for char in text] for text in texts]
        if self.kind == "gpt2":
            if sum(map(len, texts)) > 1 << 21:      # Python ends no sooner than such threads
                return [*map(self._gpt2_ids, texts)]
            with ThreadPoolExecutor(os.cpu_count()) as pool:
                return [*pool.map(self._gpt2_ids, texts)]
        with hint(f"the tokenizer {self.name} cannot encode this text", "take another"):
            rows = [e.ids for e in self.bpe.encode_batch_fast(texts, add_special_tokens=False)]
        special = {self.eos, self.bos, self.pad} - {self.unk}   # pieces of some vocabularies
        if all(map(special.isdisjoint, rows)):
            return rows
        if self.unk is None:
            raise UserError(f"the text spells a special token of the tokenizer {self.name}, which "
                            "has no token for what it does not know: change it, or take another")
        return [[self.unk if i in special else i for i in ids] for ids in rows]

    def _gpt2_ids(self, text):
        """A long white space, on which tiktoken's pattern fills the stack, is one piece, less a
        last character before text, as the pattern has it."""
        ids, at = [], 0
        for space in LONG_SPACE.finditer(text):
            ids += self.bpe.encode_ordinary(text[at:space.start()])
            at = space.end() - (space.end() < len(text))
            ids += self.bpe._encode_single_piece(text[space.start():at])
        return ids + self.bpe.encode_ordinary(text[at:])

    def decode(self, ids):
        """The text of ids (list, array or tensor). It leaves out specials and ids past the
        vocabulary; bytes that are not UTF-8 become U+FFFD."""
        if self.kind == "hf":
            return self.bpe.decode(self._said(ids))
        return self.decode_bytes(ids).decode(errors="replace")

    def decode_bytes(self, ids):
        """As decode, before bytes become characters: of parts that cut a character it is exact."""
        ids = self._said(ids)
        if self.kind == "byte":
            return bytes(ids)
        if self.kind == "char":
            return "".join(self.spec["characters"][i] for i in ids).encode(errors="replace")
        if self.kind == "gpt2":
            return self.bpe.decode_bytes(ids)
        if "ByteLevel" not in json.dumps(self.spec["tokenizer"]["decoder"]):
            return self.bpe.decode(ids).replace("\ufffd", "?").encode()   # one for a lone byte
        added = self.bpe.get_added_tokens_decoder()
        return b"".join(
            bytes(BYTES.get(c, 63) for c in self.bpe.id_to_token(i) or "") if i not in added
            else b"" if added[i].special else added[i].content.encode() for i in ids)

    def _said(self, ids):
        silent = self.eos, self.bos, self.pad
        return [i for i in map(int, ids) if i < self.vocab_size and i not in silent]

    def encode_infill(self, text, mask):
        """The ids of a text in which `___` wants one token, `___5` five and, at the end, `___` as
        many as there is room for; `mask` stands for each of them. A hole takes the spaces before
        it."""
        ids, *holes = re.split(r" *___(\d*)", text)
        ids = self.encode(ids)
        for count, rest in zip(holes[::2], holes[1::2]):
            ids += [mask] * min(int(count[:9] or 1), 1 << 20) + self.encode(rest)
        return ids

    def decode_masked(self, ids):
        """As decode, in one line, with a block for every id past the vocabulary."""
        text = ""
        for known, part in groupby(ids, lambda i: 0 <= i < self.vocab_size):
            text += self.decode(part) if known else "░" * len([*part])
        return " ".join(text.split())

    def save(self, folder):
        (Path(folder) / "tokenizer.json").write_text(json.dumps(self.spec))


def fingerprint(spec):
    """16 hexadecimal digits of a tokenizer's definition (see Tokenizer.spec)."""
    spec = {k: v for k, v in spec.items() if k != "grammar"}    # a remark of tales_bpe.json
    return sha(json.dumps(spec, sort_keys=True).encode())[:16]


def natural_vocab(tokenizer, vocab_size):
    """vocab_size, or for 0 the tokenizer's own (char and hf: 0, not known yet). UserError if
    impossible."""
    sizes = {"bpe": (257, 1 << 20, 2048), "gpt2": (257, 50257, 50257), "byte": (257, 257, 257)}
    if tokenizer not in {*sizes, "char"} and not tokenizer.startswith("hf:"):
        raise UserError(f"unknown tokenizer {tokenizer!r}: choose bpe, gpt2, byte, char or hf:NAME")
    low, high, natural = sizes.get(tokenizer, (0, 0, 0))
    if vocab_size and not low <= vocab_size <= high:
        raise UserError(f"--vocab-size {vocab_size} does not suit the tokenizer {tokenizer}: "
                        + (f"choose {low} to {high}" if low < high else "leave it out, or take the "
                           "tokenizer of the checkpoint"))
    return vocab_size or natural


def get_tokenizer(spec, vocab_size=0):
    """The tokenizer `gpt2`, `byte` or `hf:NAME` (on the hub; or hf:PATH, a tokenizer.json or its
    folder). UserError if it needs a text, does not exist or cannot be downloaded."""
    n = natural_vocab(spec, vocab_size)
    if spec in ("bpe", "char"):
        raise UserError(f"the tokenizer {spec} is made from a text: use prepare()")
    return _hf(spec) if n == 0 else _own(spec, n, **(_gpt2(n) if spec == "gpt2" else {}))


def _own(kind, n, name=None, **more):
    return Tokenizer({"kind": kind, "name": name or kind, "vocab_size": n, "eos": n - 1,
                      "bos": n - 1, "pad": n, **more})


def train_bpe(texts, vocab_size=2048):
    """A byte-level BPE of at most vocab_size ids, EOS included, from an iterator of texts."""
    from tokenizers import Tokenizer as Fast, decoders, models, pre_tokenizers, trainers
    bpe = Fast(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=natural_vocab("bpe", vocab_size) - 1, min_frequency=2, show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet())

    def pieces(stopped):
        for text in texts:
            if stopped.is_set():
                raise InterruptedError
            yield [piece for piece in LONG_WORD.split(text) if piece]
    _run(lambda stopped: bpe.train_from_iterator(pieces(stopped), trainer))
    return _own("hf", bpe.get_vocab_size() + 1, "bpe", tokenizer=json.loads(bpe.to_str()))


def char_tokenizer(texts):
    """The tokenizer whose ids are the characters of an iterator of texts, in order, and EOS."""
    found = set()
    for text in texts:
        found.update(text)
    return _own("char", len(found) + 1, characters=sorted(found))


def train_tales_tokenizer():
    """Write data/tales_bpe.json. Once per grammar: new merges orphan every checkpoint."""
    from data.tales import Tales, stories
    tok = train_bpe(text for text, _ in stories(10_000, SEEDS["tokenizer"]))
    TALES_BPE.write_text(json.dumps({**tok.spec, "grammar": Tales().version}) + "\n")
    return tok


def load_tokenizer(path):
    """The tokenizer of a prepared folder, or of a file that Tokenizer.save wrote."""
    path = Path(path)
    path = path / "tokenizer.json" if path.is_dir() else path
    with hint(f"{path} is missing or broken", "delete its folder and run again"):
        return Tokenizer(json.loads(path.read_text()))


def _gpt2(n):
    """GPT-2's pattern and its first n - 1 tokens, in base64, in the order of their ids."""
    folder = Path(os.environ.get("TIKTOKEN_CACHE_DIR") or os.environ.get("DATA_GYM_CACHE_DIR")
                  or Path(tempfile.gettempdir()) / "data-gym-cache")
    urls = GPT2_URL + "vocab.bpe", GPT2_URL + "encoder.json"
    names = [hashlib.sha1(url.encode()).hexdigest() for url in urls]
    with hint(f"GPT-2's merges are not in {folder} and cannot be downloaded",
              f"on a machine with a network save {urls[0]} as {names[0]} and {urls[1]} as "
              f"{names[1]} in one folder, copy it here and set TIKTOKEN_CACHE_DIR to it, or take "
              "--tokenizer bpe"):
        if not (all((folder / name).exists() for name in names) or _reachable(GPT2_URL)):
            raise ConnectionError("no network")     # tiktoken would wait without a limit
        from tiktoken_ext.openai_public import gpt2
        table = gpt2()
    tokens = sorted(table["mergeable_ranks"], key=table["mergeable_ranks"].get)[:n - 1]
    return {"pattern": table["pat_str"], "ranks": [base64.b64encode(t).decode() for t in tokens]}


def _hf(spec):
    name, file = spec.removeprefix("hf:"), _hf_file(spec)
    with hint(f"cannot load the tokenizer {name}", "check its name, or on a machine with a network "
              "download its tokenizer.json and pass that file as hf:PATH"):
        if not file:
            _online()
        from tokenizers import Tokenizer as Fast
        tok = Fast.from_file(str(file)) if file else _run(lambda _: Fast.from_pretrained(name))
    spec_of = json.loads(tok.to_str())
    model = spec_of["model"]
    if model["type"] == "BPE" and not (model.get("unk_token") or model.get("byte_fallback") or
                                       "ByteLevel" in json.dumps(spec_of["pre_tokenizer"])):
        raise UserError(f"the tokenizer {name} drops the characters that it does not know: take "
                        "one with an unknown token or with bytes")
    vocab = tok.get_vocab(with_added_tokens=True)
    n = max(vocab.values()) + 1

    def find(names, default=None):
        return next((vocab[name] for name in names.split() if name in vocab), default)
    eos = find(END + " </s> [SEP] <eos> <|end_of_text|>")
    if eos is None:
        raise UserError(f"the tokenizer {name} has no token that ends a document, such as </s> or "
                        "[SEP]: take another")
    return Tokenizer({"kind": "hf", "name": spec, "vocab_size": n, "eos": eos,
                      "bos": find("<s> [CLS] <bos> <|begin_of_text|>", eos),
                      "pad": find("[PAD] <pad>", n), "tokenizer": spec_of})


def _hf_file(spec):
    """The local file of a tokenizer hf:PATH, else None."""
    path = Path(os.path.expanduser(spec.removeprefix("hf:")))
    if spec.startswith("hf:") and path.exists():
        file = path / "tokenizer.json" if path.is_dir() else path
        if spec == "hf:" or not file.exists():
            raise UserError(f"--tokenizer {spec} names no tokenizer.json: give hf:NAME of the hub, "
                            "or hf:PATH of that file or its folder")
        return file


# ---- sources -----------------------------------------------------------------------------------

@dataclass
class Source:
    name: str           # as the user wrote it
    key: object         # JSON that changes when the content does
    rule: str           # how documents and splits are made
    read: Callable      # () -> iterator of (split, or None for "by hash"; text; log p or None)
    total: int = None   # for the progress bar: documents or bytes, if known
    unit: str = "doc"
    note: str = None    # what to tell the user


def find_source(name, max_docs=0, split="auto"):
    """The Source of a name or path. max_docs limits its documents; where the source has splits of
    its own, those of train, and val and test to max(20, max_docs / 10). split: how a .txt becomes
    documents, auto or lines. UserError if there is none."""
    if max_docs < 0:
        raise UserError(f"--max-docs {max_docs} is negative: give a number of documents, or 0 for "
                        "all")
    if split not in ("auto", "lines"):
        raise UserError(f"unknown --split {split!r}: choose auto or lines")
    if split == "lines" and name in ("tales", *HUB):
        raise UserError(f"--split lines is for .txt files, and {name} is none: leave it out")
    if name == "tales":
        return _tales(max_docs)
    if name in HUB:
        return _hub(name, max_docs)
    path = Path(os.path.realpath(os.path.expanduser(name)))     # resolve() fails in a circle
    if not name or not path.exists():
        raise UserError(f"{name!r} is neither a file or folder nor one of the names tales, "
                        f"{', '.join(HUB)}: check it")
    return _local(name, path, max_docs, split)


def _tales(max_docs):
    from data.tales import Tales
    counts = {s: min(n, max(20, max_docs // 10)) if max_docs and s != "train" else max_docs or n
              for s, n in TALES.items()}

    def read():
        for split, n in counts.items():
            for text, logp in _tell(n, SEEDS[split], split != "train"):
                yield split, text, logp
    return Source("tales", [Tales().version, counts], f"stories, split by their seeds {SEEDS}",
                  read, sum(counts.values()))


TELLER = """
import json, sys
sys.path.insert(0, {root!r})
from data.tales import Tales, stories
tales = Tales()
score = tales.logp if {score} else lambda text: None
for start in range({first}, {n}, {step}):
    told = stories(min({chunk}, {n} - start), {seed}, tales, start=start)
    print(json.dumps([(text, score(text)) for text, _ in told]), flush=True)
"""


def _tell(n, seed, score, chunk=100):
    """Stories 0 ... n - 1 of a seed with their exact log p (nats) if `score`. k processes tell
    every k-th chunk: plain ones, which work from notebooks and threads alike and end by
    themselves when nobody reads them any more."""
    k = min(os.cpu_count() or 1, 4, -(-n // chunk))
    code = [TELLER.format(root=str(ROOT), score=score, first=i * chunk, n=n, step=k * chunk,
                          chunk=chunk, seed=seed) for i in range(k)]
    tellers = [subprocess.Popen([sys.executable, "-c", c], stdout=subprocess.PIPE,
                                start_new_session=True) for c in code]  # Ctrl-C is for us alone
    try:
        for start in range(0, n, chunk):
            line = tellers[start // chunk % k].stdout.readline()
            if not line:
                raise RuntimeError("data/tales.py failed; its message stands above")
            yield from json.loads(line)
    finally:
        for teller in tellers:
            teller.kill()
            teller.communicate()


def _walk(folder, seen):
    """The files below a folder in the order of their names, through links, each folder once;
    without hidden files and those of the system."""
    seen.add(folder.resolve())
    for path in sorted(folder.iterdir()):
        if path.name[0] == "." or path.name in ("__MACOSX", "Thumbs.db", "desktop.ini"):
            continue
        if not path.is_dir():
            yield path
        elif path.resolve() not in seen:
            yield from _walk(path, seen)


def _kind(path):
    """txt, jsonl, parquet or arrow; None for what is no text."""
    end = re.search(r"\.(txt|jsonl)(\.gz)?$|\.(parquet|arrow)$|\.(gz|zst|bz2|xz|zip|lz4)$",
                    path.name.lower())
    if end and end[4]:
        raise UserError(f"{path} is packed in a way that is not read here: unpack it, or pack .txt "
                        "or .jsonl with gzip")
    return end and (end[1] or end[3])


def _local(name, path, max_docs, split):
    parts = _saved(name, path)
    found = [path] if path.is_file() else list(_walk(path, set())) if path.is_dir() else []
    kinds = {}
    for file in chain.from_iterable(parts.values()) if parts else found:
        kinds.setdefault(_kind(file), []).append(file)
    left = [] if parts else kinds.pop(None, []) + kinds.pop("arrow", [])
    if not kinds:
        raise UserError(f"{name} is no text: give a .txt, .jsonl or .parquet file, or a folder of "
                        "such files")
    if len(kinds) > 1:
        raise UserError(f"{name} holds " + " and ".join(
            f"{len(files)} .{kind} ({files[0].relative_to(path)}{' ...' * (len(files) > 1)})"
            for kind, files in kinds.items()) + ": give one of these files, or a folder of one "
            "kind")
    [(kind, files)] = kinds.items()
    if split == "lines" and kind != "txt":
        raise UserError(f"--split lines is for .txt files, and {name} holds .{kind} files: leave "
                        "it out")
    if broken := [f for f in files if not f.is_file()]:
        raise UserError(f"{broken[0]} is no file or a link to nothing: repair or remove it")
    stats = [f.stat() for f in files]
    key = [[(str(f), s.st_size, s.st_mtime_ns) for f, s in zip(files, stats)], max_docs]
    key += [split] if split == "lines" else []
    note = left and (f"left out of {name}, as neither .txt, .jsonl nor .parquet: {left[0].name}"
                     + (f" and {len(left) - 1} more" if len(left) > 1 else ""))

    def read():
        texts = (_jsonl(f) if kind == "jsonl" else _lines(f) if split == "lines"
                 else _txt(f, len(files) == 1) for f in files)
        return ((None, text, None) for text in islice(chain.from_iterable(texts), max_docs or None))
    if kind in ("arrow", "parquet"):
        if not parts:   # the names of a hub repository: train-00000-of-00002.parquet
            names = [re.fullmatch(r"([a-z]+)(-\d{5}-of-\d{5}.*)?", f.stem) for f in files]
            for file, found in zip(files, names):
                parts.setdefault(found[1] if found else "", []).append(file)
            parts = parts if parts.keys() <= {*SPLITS, *VAL} else {"": files}
        return Source(name, [*key, "own"], "rows; the dataset's splits if it has train and "
                      "validation or test, else by hash", lambda: _rows(
                          lambda: {k: chain.from_iterable(map(_table, v)) for k, v in
                                   parts.items()}, max_docs, name, "check its files"),
                      max_docs or None, note=note)
    rule = "lines" if kind == "jsonl" or split == "lines" else (
        f"between {END}, or small files of a folder, or else running text cut after {SHORT} "
        "characters")
    packed = any(f.suffix.lower() == ".gz" for f in files)
    total, unit = (max_docs or None, "doc") if max_docs or packed else (
        sum(s.st_size for s in stats), "B")
    return Source(name, key, rule + "; split by hash", read, total, unit, note)


def _saved(name, path):
    """{split: its files} of a folder that `datasets.save_to_disk` wrote, else {}."""
    of_dict, of_split = ((path / file).read_text("utf-8") if (path / file).exists() else None
                         for file in ("dataset_dict.json", "state.json"))
    with hint(f"cannot read {name}", "save the dataset again"):
        if of_dict:
            return {k: _saved(name, path / k)[""] for k in json.loads(of_dict)["splits"]}
        state = json.loads(of_split or "{}")
        if "_data_files" in state:
            return {"": [path / f["filename"] for f in state["_data_files"]]}
        return {}


def _table(path):
    """The rows of a .parquet or .arrow file as dictionaries, `text` alone if it has that."""
    import pyarrow as pa
    import pyarrow.parquet as pq
    with open(path, "rb") as file:
        if path.suffix.lower() == ".parquet":
            table = pq.ParquetFile(file)
            columns = ["text"] if "text" in table.schema_arrow.names else None
            batches = table.iter_batches(1000, columns=columns)
        else:
            batches = pa.ipc.open_stream(file)
        for batch in batches:
            names = ["text"] if "text" in batch.schema.names else batch.schema.names
            yield from batch.select(names).to_pylist()


def _open(path):
    return gzip.open(path) if path.suffix.lower() == ".gz" else open(path, "rb")


def _utf8(path):
    """The text of a file in blocks, its line ends as \n. UserError at a byte of another code."""
    with hint(f"cannot read {path}", "check the file"), io.TextIOWrapper(
            _open(path), encoding="utf-8-sig") as file:
        try:
            while block := file.read(1 << 20):
                yield block
        except UnicodeDecodeError as e:
            byte = file.buffer.tell() - len(e.object) + e.start
            raise UserError(f"{path} is not UTF-8 at byte {byte}: convert it (for example with "
                            "iconv) and run again") from None


def _txt(path, alone):
    """The documents of a .txt file; one that is `alone`, without marks, is running text."""
    rest, running, marked = "", False, not alone
    for block in _utf8(path):
        *pieces, rest = (rest + block).split(END)
        for piece in pieces:
            yield from _passages(piece) if running else [piece.strip()]
            running, marked = False, True
        if running or len(rest) > WHOLE:
            running = True
            *passages, rest = _passages(rest, more=True)
            yield from passages
    yield from _passages(rest) if running or not marked else [rest.strip()]


def _lines(path):
    """The lines of a .txt file that are not blank; a mark ends a line too."""
    rest = ""
    for block in _utf8(path):
        *lines, rest = (rest + block).replace(END, "\n").split("\n")
        yield from (line for line in lines if line.strip())
    yield from [rest] if rest.strip() else []


def _passages(text, more=False):
    """Running text in documents; if there is more to come, what has to wait for it is last."""
    out, at = [], 0
    while len(text) - at > (LONG + len(END) if more else SHORT):    # END may be half read
        window = text[at:at + LONG]
        ends = (re.compile(r).search(window, SHORT) for r in (r"\n[ \t]*\n\s*", r"\n", r"\s"))
        end = next((m.end() for m in ends if m), len(window))
        out.append(window[:end].strip())
        at += end
    return out + [text[at:] if more else text[at:].strip()]


def _jsonl(path):
    with hint(f"cannot read {path}", "check the file"), _open(path) as file:
        for number, line in enumerate(file, 1):
            if line.strip():
                with hint(f"line {number} of {path} is not JSON", "repair or remove it"):
                    row = json.loads(line)
                text = _text(row, f"line {number} of {path}")
                yield text.encode(errors="replace").decode()    # JSON can spell half a character


def _text(row, where):
    if isinstance(row, dict):
        strings = [v for v in row.values() if isinstance(v, str)]
        text = row["text"] if "text" in row else strings[0] if len(strings) == 1 else None
        text = "" if text is None and "text" in row else text
        if isinstance(text, str):
            return text
    raise UserError(f"{where} has no text: it needs a string field `text`, or a single string")


def _rows(load, max_docs, where, advice, group=None):
    """The documents of an iterable of dictionaries, or of a dictionary of such splits."""
    with hint(f"cannot read {where}", advice):
        found = load()
        found = found if isinstance(found, dict) else {"": found}
        data = {VAL.get(k, k): v for k, v in found.items()}
        own = "train" in data and len(data.keys() & {*SPLITS}) > 1
        if own and (data.keys() - {*SPLITS} or len(data) < len(found)):
            raise UserError(f"{where} has the splits {', '.join(found)}: keep only train, "
                            "validation and test of them")
        data = data if own else {"": chain.from_iterable(data.values())}
        for split in SPLITS if own else data:
            limit = max(20, max_docs // 10) if max_docs and own and split != "train" else max_docs
            rows = enumerate(data.get(split, ()))
            texts = (_text(row, f"row {i} of {split} of {where}".replace(" of  of ", " of "))
                     for i, row in rows)
            for text in islice(group(texts) if group else texts, limit or None):
                missing = {*SPLITS} - data.keys() if split != "train" else ()
                halved = missing and _hash(text) % 2
                yield (min(missing) if halved else split) if own else None, text, None


def _hub(name, max_docs):
    repository, config, streaming = HUB[name]
    group, rule = (_articles, "articles") if name == "wikitext2" else (None, "rows")

    def load():
        stream = _online() and streaming    # offline: whatever HF_HOME holds
        import datasets
        datasets.logging.set_verbosity(datasets.logging.CRITICAL)   # the sentence of hint is enough
        return datasets.load_dataset(repository, config, streaming=stream)
    advice = (f"run `python data/prepare.py {name}` on a machine with a network and copy its "
              "data/cache or HF_HOME folder")
    if not group:   # whose files hold lines, no articles
        advice += (f", or download {repository} from huggingface.co and give its path in place of "
                   "the name")
    return Source(name, [HUB[name], max_docs], rule + "; the hub's splits if it has validation, "
                  "else by hash", lambda: _rows(load, max_docs, name, advice, group),
                  max_docs or None)


def _articles(lines):
    """WikiText's lines joined: an article begins at a heading of the first level, ` = X = `."""
    article = []
    for line in lines:
        if re.fullmatch(r" = [^=].* = \n?", line) and article:
            yield "".join(article).strip()
            article = []
        article.append(line.rstrip("\n") + "\n")
    yield "".join(article).strip()


def _online():
    """Whether the hub answers; if not, tell its libraries, which would retry for half a minute."""
    offline = os.environ.get("HF_HUB_OFFLINE", "") not in ("", "0") or not _reachable(
        os.environ.get("HF_ENDPOINT") or "https://huggingface.co")
    if offline:
        os.environ["HF_HUB_OFFLINE"] = "1"      # read when they are imported, if they are not yet
        for module in {"huggingface_hub.constants", "datasets.config"} & set(sys.modules):
            sys.modules[module].HF_HUB_OFFLINE = True
    return not offline


def _reachable(url):
    import requests
    try:
        requests.head(url, timeout=5)
    except requests.RequestException:
        return False
    return True


# ---- writing -----------------------------------------------------------------------------------

def prepare(name="tales", tokenizer="bpe", vocab_size=0, max_docs=0, cache=None, quiet=False,
            split="auto"):
    """The folder of a complete dataset, made if it is not there. vocab_size 0: the tokenizer's
    own (bpe: 2048); max_docs 0: all (tales: 100 000 stories; fineweb: 100 000 documents); cache:
    the parent folder, else TEXT_DIFFUSION_CACHE, else data/cache; split: auto, or lines for one
    document a line. UserError: the user can repair it."""
    cache = Path(cache or _cache())

    def say(text):
        if not quiet:
            print(text, file=sys.stderr)
    try:
        vocab_size = natural_vocab(tokenizer, vocab_size)
        max_docs = max_docs or (FINEWEB_DOCS if name == "fineweb" else 0)
        source = find_source(str(name), max_docs, split)
        stored = (source.name, tokenizer, vocab_size) == ("tales", "bpe", 2048)
        file = TALES_BPE if stored else _hf_file(tokenizer)
        form = FORMAT + tokenizer.startswith("hf:")     # special tokens of vocabularies are unknown
        key = [form, source.key, tokenizer, vocab_size, file and sha(file.read_bytes())]
        size = f"-{vocab_size}" if tokenizer in ("bpe", "gpt2") else ""
        parts = [Path(source.name).resolve().stem, tokenizer + size, f"{max_docs or 'all'}"]
        parts = [re.sub(r"[^A-Za-z0-9._-]+", "_", part)[-40:] for part in parts]
        folder = cache / "-".join(parts + [sha(json.dumps(key).encode())[:8]])
        if not folder.exists():
            _make(folder, lambda path: _build(path, source, tokenizer, vocab_size, quiet, say),
                  say)
    except OSError as e:
        raise UserError(f"cannot prepare {name} ({e.strerror or e}: {e.filename or cache}): check "
                        "its rights and the free space; TEXT_DIFFUSION_CACHE names another folder "
                        "for the result") from None
    verify(folder)
    return folder


def refuse_unknown(name, tokenizer):
    """UserError unless these data are tales or were prepared here before."""
    known = {"tales", "bpe", "byte", "char", "gpt2"}
    for path in _cache().glob("*/meta.json"):
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
            meta = json.loads(path.read_text("utf-8"))
            known |= {meta["source"], meta["tokenizer"]}
    if not {name, tokenizer} <= known:
        raise UserError(f"the checkpoint is of the data {name!r} with the tokenizer {tokenizer!r}, "
                        "which were never prepared here: name the data with --data to read them")


def _cache():
    return Path(os.environ.get("TEXT_DIFFUSION_CACHE") or ROOT / "data" / "cache")


def _make(folder, build, say):
    """build(a temporary folder), then give it its name. One process builds and the others wait;
    the lock of a process that died is free, and what it left is cleared by the next one."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    for left in folder.parent.glob("*.partial"):
        with _lock(left.with_suffix("")) as mine:
            if mine:
                shutil.rmtree(left, ignore_errors=True)
    with _lock(folder, lambda: say(f"waiting for the process that prepares {folder.name}")):
        if folder.exists():
            return
        partial = folder.with_name(folder.name + ".partial")
        shutil.rmtree(partial, ignore_errors=True)      # of a process that died while we waited
        partial.mkdir()
        try:
            build(partial)
            for path in [*partial.iterdir(), partial]:
                _sync(path)
            partial.rename(folder)
            _sync(folder.parent)
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            raise


def _sync(path):
    if os.name == "nt":             # Windows syncs neither folders nor files opened to be read
        return
    file = os.open(path, os.O_RDONLY)
    os.fsync(file)
    os.close(file)


@contextlib.contextmanager
def _lock(folder, waiting=None):
    """Hold the lock of a folder that is being made; yields False if another process holds it,
    or, given `waiting`, calls that and waits."""
    locks = folder.parent / ".locks"
    locks.mkdir(exist_ok=True)
    lock = FileLock(locks / (folder.name + ".lock"))
    try:
        lock.acquire(timeout=0)
    except Timeout:
        if not waiting:
            yield False
            return
        waiting()
        lock.acquire()
    try:
        yield True
    finally:
        lock.release()


def _build(folder, source, tokenizer, vocab_size, quiet, say):
    if source.note:
        say(source.note)
    cut = _cuts(source)
    tok = _tokenizer(source, tokenizer, vocab_size, cut, say)
    tok.save(folder)
    writers = {split: Writer(folder, split, tok) for split in SPLITS}
    bar = tqdm(total=source.total, unit=source.unit, unit_scale=True, desc=source.name,
               disable=quiet or None)   # None: shown on a terminal only
    for batch in _batches(source.read()):
        rows = _run(lambda _: tok.encode_batch([text for _, text, _ in batch]))
        for (split, text, logp), ids in zip(batch, rows):
            size = len(text.encode())
            writers[split or _split(text, cut)].add(ids, size, logp)
            bar.update(size if source.unit == "B" else 1)
    bar.close()
    splits = {split: writer.close() for split, writer in writers.items()}
    if empty := [split for split in SPLITS if not splits[split]["documents"]]:
        raise UserError(f"{source.name} has no document for {' and '.join(empty)}: give more, or "
                        "the files of train alone, which are split by hash")
    meta = {"format": FORMAT, "source": source.name, "key": source.key, "splits": splits,
            "split_rule": source.rule,
            "tokenizer": tok.name, "fingerprint": tok.fingerprint, "vocab_size": tok.vocab_size,
            "eos": tok.eos, "bos": tok.bos, "pad": tok.pad, "dtype": writers["train"].dtype}
    if source.name == "tales":
        meta["grammar"] = source.key[0]
    (folder / "meta.json").write_text(json.dumps(meta, indent=1))


class Writer:
    """One split: its .bin as it grows, and 8 bytes a document in memory for the index."""

    def __init__(self, folder, split, tok):
        self.path, self.eos = folder / split, tok.eos
        self.dtype = "uint16" if tok.vocab_size <= 65_535 else "uint32"
        self.file, self.sha, self.bytes = open(f"{self.path}.bin", "wb"), hashlib.sha256(), 0
        self.offsets, self.logp = array("q", [0]), array("d")
        self.counts = np.zeros(tok.vocab_size, np.int64)    # how often each id occurs

    def add(self, ids, size, logp):
        ids = np.array(ids + [self.eos], self.dtype)
        np.add.at(self.counts, ids, 1)
        data = ids.tobytes()
        self.file.write(data)
        self.sha.update(data)
        self.bytes += size
        self.offsets.append(self.offsets[-1] + len(ids))
        if logp is not None:
            self.logp.append(logp)

    def close(self):
        """Write the index; what meta.json says about the split."""
        self.file.close()
        offsets, logp = np.array(self.offsets), np.array(self.logp)
        np.save(f"{self.path}.idx.npy", offsets)
        p = self.counts[self.counts > 0] / self.counts.sum()
        stats = {"documents": len(offsets) - 1, "tokens": int(offsets[-1]), "bytes": self.bytes,
                 "longest": int(np.diff(offsets).max(initial=0)), "sha256": self.sha.hexdigest(),
                 "sha256_idx": sha_of(f"{self.path}.idx.npy"),
                 "unigram_entropy": float(-(p * np.log(p)).sum())}     # nats per token, with EOS
        if len(logp):
            if not np.isfinite(logp).all():
                raise UserError("a story has probability 0: data/tales.txt was edited while its "
                                "stories were written; run again")
            np.save(f"{self.path}.logp.npy", logp)
            stats["sha256_logp"] = sha_of(f"{self.path}.logp.npy")
            stats["entropy_per_doc"] = -logp.mean()
            stats["entropy_se"] = logp.std(ddof=1) / len(logp) ** 0.5
        return stats


def _tokenizer(source, tokenizer, vocab_size, cut, say):
    if tokenizer == "char":
        say("collecting the characters of the text")
        return char_tokenizer(text for _, text, _ in source.read())
    if tokenizer != "bpe":
        return get_tokenizer(tokenizer, vocab_size)
    if source.name != "tales":
        texts = _sample(source, cut)
    elif vocab_size == 2048:
        return load_tokenizer(TALES_BPE)
    else:
        from data.tales import stories
        texts = (text for text, _ in stories(10_000, SEEDS["tokenizer"]))
    say(f"training a BPE of {vocab_size} ids")
    tok = train_bpe(texts, vocab_size)
    if tok.vocab_size < vocab_size:
        say(f"no more than {tok.vocab_size} ids: no further pair of tokens occurs twice")
    return tok


def _sample(source, cut):
    left = SAMPLE
    for split, text, _ in source.read():
        if (split or _split(text, cut)) == "train":
            yield text[:left]
            left -= len(text)
            if left <= 0:
                return


def _batches(docs):
    """Lists of documents, about half a million characters each, without empty documents."""
    batch, size = [], 0
    for doc in docs:
        if doc[1]:
            batch.append(doc)
            size += len(doc[1])
        if size >= 1 << 19:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _cuts(source):
    """Two hashes: a document below the first is in val, else below the second in test."""
    hashes = set()
    for split, text, _ in source.read():
        if text and split:
            return None     # it has splits of its own
        if text:
            hashes.add(_hash(text))
        if len(hashes) == 1000:
            return 2 ** 64 // 50, 2 ** 64 // 25
    if not hashes:
        raise UserError(f"{source.name} is empty: give a source that has text")
    if len(hashes) < 3:
        raise UserError(f"{source.name} has {len(hashes)} different document(s), and train, val "
                        f"and test need one each: give more text or --max-docs, or divide it by "
                        f"{END}, or a .txt by --split lines")
    n, hashes = max(1, len(hashes) // 50), sorted(hashes)
    return hashes[n], hashes[2 * n]


def _split(text, cut):
    h = _hash(text)
    return "val" if h < cut[0] else "test" if h < cut[1] else "train"


def _hash(text):
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big")


# ---- reading -----------------------------------------------------------------------------------

def verify(folder):
    """Every file against meta.json: its size, its sha256 (up to CHECKED bytes, a second) and the
    tokenizer's fingerprint. UserError naming the first file that is missing or damaged."""
    folder = Path(folder)

    def check(name, read, expected=None):
        try:
            found = read(folder / name)
            if expected in (None, found):
                return found
        except Exception:  # numpy and json have many ways to say it
            pass
        raise UserError(f"{folder / name} is missing or damaged: delete the folder {folder} and "
                        "run again")

    def ends(file):
        offsets = np.load(file, mmap_mode="r")
        return [len(offsets), int(offsets[-1])]

    def parse(file):
        return json.loads(file.read_text())

    def facts(file):
        meta = parse(file)
        for n in (meta["splits"][split] for split in SPLITS):
            n["documents"] + n["tokens"] + DTYPES[meta["dtype"]].itemsize, n["sha256"]
            n["unigram_entropy"] + 0.0  # both lines raise if a value is missing or no number
        return meta
    meta = check("meta.json", facts)
    check("tokenizer.json", lambda file: fingerprint(parse(file)), meta.get("fingerprint", ""))
    for split in SPLITS:
        n = meta["splits"][split]
        size = n["tokens"] * DTYPES[meta["dtype"]].itemsize
        check(f"{split}.bin", lambda file: file.stat().st_size, size)
        check(f"{split}.idx.npy", ends, [n["documents"] + 1, n["tokens"]])
        if "entropy_se" in n:
            check(f"{split}.logp.npy", lambda file: len(np.load(file)), n["documents"])
        for kind, key in (("bin", "sha256"), ("idx.npy", "sha256_idx"), ("logp.npy",
                                                                         "sha256_logp")):
            if key in n and (folder / f"{split}.{kind}").stat().st_size <= CHECKED:
                check(f"{split}.{kind}", sha_of, n[key])


def open_split(folder, split):
    """Of train, val or test: the tokens (memmap), the offsets of its n documents (n + 1,), and
    their exact log p in nats (n,), which only val and test of tales have, else None."""
    path = Path(folder) / split
    dtype = DTYPES[json.loads((Path(folder) / "meta.json").read_text())["dtype"]]
    logp = Path(f"{path}.logp.npy")
    return (np.memmap(f"{path}.bin", dtype, mode="r"), np.load(f"{path}.idx.npy"),
            np.load(logp) if logp.exists() else None)


@dataclass
class Data:
    """What load_data returns: each split as open_split reads it."""
    tokenizer: Tokenizer
    train: tuple
    val: tuple
    test: tuple
    unigram_entropy: float      # of val, nats per token
    fingerprint: str    # of the documents and their split


def load_data(cfg, quiet=False):
    """Prepare the data that cfg names if needed and return them as Data. It writes into cfg what
    the data fix: vocab_size, eos, bos, and docs or stream where rows is auto."""
    # char and hf have a size of their own; the cfg of a checkpoint holds it and must not be refused
    asked = cfg.vocab_size if natural_vocab(cfg.tokenizer, 0) else 0
    folder = prepare(cfg.data, cfg.tokenizer, asked, cfg.max_docs, quiet=quiet, split=cfg.split)
    tok, meta = load_tokenizer(folder), json.loads((folder / "meta.json").read_text())
    if cfg.vocab_size != tok.vocab_size:
        natural_vocab(cfg.tokenizer, cfg.vocab_size)
    for name in ("vocab_size", "eos", "bos"):
        if hasattr(cfg, name):
            setattr(cfg, name, getattr(tok, name))
    if cfg.rows == "auto":
        cfg.rows = "docs" if cfg.data == "tales" else "stream"
    tokens = "".join(meta["splits"][split]["sha256"] for split in SPLITS)
    data = Data(tok, *(open_split(folder, split) for split in SPLITS),
                meta["splits"]["val"]["unigram_entropy"], sha(tokens.encode())[:16])
    for split, name in ("train", "training"), ("val", "val"), ("test", "test"):
        n = len(getattr(data, split)[0])
        if cfg.rows == "stream" and n < cfg.seq_len + (split == "train"):
            raise UserError(f"the {name} split has {n} tokens, "
                            f"{'fewer' if n < cfg.seq_len else 'not more'} than --seq-len "
                            f"{cfg.seq_len}: use a smaller --seq-len, more text or --rows docs")
    return data


# ---- main --------------------------------------------------------------------------------------

def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", metavar="NAME|PATH")
    parser.add_argument("--tokenizer", default="bpe",
                        help="bpe, gpt2, byte, char, hf:NAME or hf:PATH")
    parser.add_argument("--vocab-size", "--vocab_size", type=int, default=0,
                        help="ids of the tokenizer; 0: its own number (bpe: 2048)")
    parser.add_argument("--max-docs", "--max_docs", type=int, default=0,
                        help="only so many documents; 0: all")
    parser.add_argument("--split", default="auto",
                        help="lines: every line of a .txt is a document (default: auto)")
    parser.add_argument("--cache", help="parent folder of the result (default: data/cache)")
    parser.error = lambda message: parser.exit(2, f"error: {message}\n")
    folder = prepare(**vars(parser.parse_args(argv)))
    meta = json.loads((folder / "meta.json").read_text())
    print(f"{folder}\ntokenizer {meta['tokenizer']}, {meta['vocab_size']} ids, {meta['dtype']}")
    for split, n in meta["splits"].items():
        print(f"{split:5} {n['documents']:9,} documents {n['tokens']:13,} tokens "
              f"{n['bytes'] / n['tokens']:.2f} bytes/token, longest {n['longest']:,}"
              + (f", entropy {n['entropy_per_doc']:.2f} +- {n['entropy_se']:.2f} nats/document"
                 if "entropy_se" in n else ""))
    print(f"unigram entropy of val {meta['splits']['val']['unigram_entropy']:.3f} nats/token")
    tokens, offsets, _ = open_split(folder, "train")
    print("first:", load_tokenizer(folder).decode(tokens[:min(offsets[1], 80)]))


if __name__ == "__main__":
    run_main(main)
