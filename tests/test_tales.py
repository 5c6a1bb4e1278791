"""data/tales.py: the grammar, its exact probabilities, the grades of texts, the command line."""
import math
import random
import re
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
from data.tales import SEPARATOR, SKEW, Tales, entropy, grade, stories  # noqa: E402
from oracles import chi_square  # noqa: E402

GRAMMAR = (ROOT / "data" / "tales.txt").read_text(encoding="ascii")

# every construct of the rule language; each text has one derivation
TINY = """
# a comment
boys(name; he=he) Tom / Al
girls(name; he=she) Ann / Eve
beasts(name; s=s; eats)
  owl; ; {a}(egg|ant) / fox; es; {bite}
  ape; s; no~food
bite = (the|some)
    (plum|fig)
digits(name) one / two
he = {hero.he}
story:
  {open}
  ({coda}|)
open:
| {hero:boys|girls}{hero} (is|was) (old|(very |too |)young
    |{a}(odd|tall) {pet:beasts}{pet}).
| {a}{pet:beasts}{pet} met {hero:girls}{hero}.
  {p}"(help|ah)!" {he} said, "{a}{pet}."
coda:
| {num:digits}{num} {more:beasts}{more}{more.s} ate {more.eats}.
| {p}then {hero} saw {pal:boys|girls}{pal}! {pal.he} left.
"""

# several derivations per text: empty options, equal words, a silent choice that the text hides
AMBIGUOUS = """
things(name; kind) cat; pet / dog; pet / oak; tree
story:
| (a|b|a|) (a|) {x:things}{x.kind} (x|x x|) (x|).
| a a {y:things}pet.
| a  pet.
"""


def listed(text):
    """Every string of a grammar with its p, checked to be a distribution."""
    p = Tales(text).listing()
    assert sum(p.values()) == pytest.approx(1, abs=1e-12)
    return p


def weights(n):
    w = [1 / (k + SKEW) for k in range(n)]
    return [x / sum(w) for x in w]


# ---- probabilities -----------------------------------------------------------------------------

def test_weights_and_exclusion_by_hand():
    """Positional weights; a second variable on a table has the first one's row taken out; a table
    that is used up leaves the others of the union."""
    p = listed("t(name) a / b / c\nu(name) d\nstory:\n| {x:t}{x} {y:t}{y}\n| {z:u}{z} {w:u|t}{w}")
    first, (w0, w1, w2) = weights(2), weights(3)
    assert p["A b"] == pytest.approx(first[0] * w0 * w1 / (1 - w0))
    assert p["C b"] == pytest.approx(first[0] * w2 * w1 / (1 - w2))
    assert p["D b"] == pytest.approx(first[1] * w1)
    assert len(p) == 6 + 3
    assert w0 > w1 > w2


def test_listing_equals_scorer():
    tales, p = Tales(TINY), listed(TINY)
    assert 1000 < len(p) < 20000
    for text in random.Random(0).sample(sorted(p), 800):
        assert tales.logp(text) == pytest.approx(math.log(p[text]), abs=1e-9)
        assert tales.derivations(text) == 1
        for wrong in (text[:-1], text + " ", text + text, text.replace(" ", "  ", 1)):
            assert wrong in p or tales.logp(wrong) == -math.inf


def test_ambiguous_texts_add_up_their_derivations():
    tales, p = Tales(AMBIGUOUS), listed(AMBIGUOUS)
    counts = {text: tales.derivations(text) for text in p}
    assert max(counts.values()) >= 4 and sum(counts.values()) > 1.5 * len(p)
    for text in p:
        assert tales.logp(text) == pytest.approx(math.log(p[text]), abs=1e-12)


@pytest.mark.parametrize("grammar", [TINY, AMBIGUOUS])
def test_samples_follow_the_listing(grammar):
    """Chi-square of 6000 samples, rare strings pooled."""
    tales, p, rng = Tales(grammar), listed(grammar), random.Random(1)
    seen = Counter(tales.sample(rng)[0] for _ in range(6000))
    assert seen.keys() <= p.keys()
    pools, texts = [], sorted(p, key=p.get)
    while texts:
        pools.append([])
        while texts and 6000 * sum(map(p.get, pools[-1])) < 8:
            pools[-1].append(texts.pop())
    counts = [sum(seen[text] for text in pool) for pool in pools]
    assert len(pools) > 10 and chi_square(counts, [sum(map(p.get, pool)) for pool in pools]) > 1e-3


# ---- surface -----------------------------------------------------------------------------------

def test_capitals_articles_and_spaces():
    """emit's rules one by one, then over the corpus."""
    grammar = """
story:
| {a}(owl|cat|urn) "(go)!" she said. {a}old man: "(no|yes)," he (lied|said). (oh|ah)! (he) left.
  {p}(then)~, {a}(ant|bee)? "(why)?" it said. "{a}egg. {a}pie," sang
    {a}hen.
"""
    said = Tales(grammar).listing()
    assert ('An urn "Go!" she said. An old man: "Yes," he lied. Ah! He left.\n'
            'Then , an ant? "Why?" it said. "An egg. A pie," sang a hen.') in said
    text = "\n\n".join(text for text, _ in stories(2000, seed=3))
    assert text.isascii() and "  " not in text and " ." not in text and " ," not in text
    assert not re.search(r"\b[Aa] [aeiou]|\b[Aa]n [^aeiou]", text)
    assert not re.search(r"[.!?] [a-z]", text)           # a sentence begins with a capital
    assert not re.search(r'(^|[ \n])"[a-z]', text)       # and so does a speech
    assert not re.search(r'[!?,]" (He|She|The)\b', text)  # but not what follows: "Help!" he cried


# ---- the corpus --------------------------------------------------------------------------------

def test_stories_have_one_derivation_and_the_sampled_logp():
    tales = Tales()
    for text, logp in stories(300, seed=1, tales=tales):
        assert tales.derivations(text) == 1
        assert tales.logp(text) == pytest.approx(logp, abs=1e-9)
        assert -160 < logp < -15


def test_story_i_is_a_function_of_seed_and_i():
    whole = list(stories(30, seed=5))
    assert list(stories(10, seed=5, start=20)) == whole[20:]
    assert list(stories(30, 5, Tales())) == whole
    assert len({text for text, _ in whole + list(stories(30, seed=6))}) == 60
    # as it was when the stored tokenizer was trained: this text may change with .version only
    assert whole[0][0].startswith("Posy was a cheerful girl who did everything alone. Posy like")
    assert Tales().version == "f51027d55d1b"


def test_entropy():
    """Between 88 and 93 nats a story; the error is that of independent draws."""
    h, error = entropy(2000, seed=2)
    assert 88 < h < 93 and abs(h - 90.25) < 5 * error
    assert 0.25 < error < 0.45
    nats = [-logp for _, logp in stories(2000, seed=2)]
    assert h == pytest.approx(sum(nats) / 2000)


def test_the_grammar_is_sane():
    """Nothing is left over, and the file says how rows are weighted."""
    tales = Tales()
    assert not tales.rules.keys() & tales.guesses.keys()
    used = set(re.findall(r"\{[^}]*?(\w+)[.}]", GRAMMAR)) | set(re.findall(r"[:|](\w+)", GRAMMAR))
    assert tales.rules.keys() - used == {"story"}
    assert tales.tables.keys() - used == set()
    lines = GRAMMAR.splitlines()
    assert max(map(len, lines)) <= 110 and GRAMMAR.isascii()
    assert lines[0].startswith("#") and re.search(rf"1 / \(k \+ {SKEW}\)", GRAMMAR)


# ---- grade -------------------------------------------------------------------------------------

def cut(text):
    """Sentences with the white space behind each."""
    return re.findall(r'.+?[.!?]"?(?:\s|$)', text, re.S)


def test_grade_by_hand():
    tales = Tales("girls(name; he=she) Ada\nboys(name; he=he) Tom\n"
                  "story:\n| {x:girls|boys}{x} ran.\n  {x.he} slept.")
    by_hand = {"Ada ran. She slept.": (1, 1, 1, 1), "Tom ran. He slept.": (1, 1, 1, 1),
               "Ada ran. He slept.": (0, 9 / 18, 1, 1 / 2), "Tom ran.": (0, 1, 1, 1),
               "Ada ran. She slept. Tom flew.": (0, 19 / 29, 2 / 3, 2 / 3), "": (0, 0, 0, 0)}
    for text, expected in by_hand.items():
        g = tales.grade(text)
        assert (g["valid"], g["prefix"], g["valid_sentences"], g["consistent"]) == expected
    names = "valid_stories", "prefix", "valid_sentences", "consistent", "true_nll"
    rates = grade(iter(by_hand), tales)
    assert tuple(rates) == names and rates["true_nll"] == pytest.approx(
        -sum(map(math.log, weights(2))) / 2)
    assert [rates[name] for name in names[:4]] == pytest.approx(
        [sum(column) / 6 for column in zip(*by_hand.values())])
    assert tuple(grade([""], tales).values()) == tuple(grade([]).values()) == (0, 0, 0, 0, None)


def test_grade_is_quick_and_never_fails():
    """Also what is no story at all."""
    tales, begin = Tales(), time.process_time()
    texts = [text for text, _ in stories(20, seed=10, tales=tales)]
    for text in texts:
        tales.grade(text)
    assert (time.process_time() - begin) / 20 < 0.5              # measured: 0.012 s
    for text in ("", " ", '"', "x" * 50000, "He was. " * 5000, ". " * 3000, " ".join(texts),
                 "caf\u00e9 \u2603. Tom"):
        begin = time.process_time()
        g = tales.grade(text)
        assert not g["valid"] and g["logp"] == -math.inf and 0 <= g["consistent"] < 0.5
        assert time.process_time() - begin < 6                   # measured: 0.5 s


# ---- the user's mistakes -----------------------------------------------------------------------

@pytest.mark.parametrize("grammar, message", [
    ("t(n) a / b\nstory:\n| {x:t}{x} {x:t}{x}", "'x' is chosen twice"),
    ("t(n) a\nstory:\n| {x:t}{x} {y:t}{y}", "no row is left for variable 'y'"),
    ("t(n) a\nstory:\n| ({x:t}|b) {x}", "'x' is said before it is chosen"),
    ("t(n) a\nx = b\nstory:\n| {x:t}{x}", "both a rule and a variable: x"),
    ("story:\n| {y}", "'y' is no rule or variable"),
    ("t(n) a\nstory:\n| {x:t}{x.m}", "'x' is no rule or variable with a cell 'm'"),
    ("story:\n| {x:t}{x}", "no table 't' for variable 'x'"),
    ("story:\n| (a|b", "left open"),
    ("story:\n| a|b)", "a bracket too many"),
    ("story:\n| a\nx = b\nx = c", "name is taken: 'x = c'"),
    ("story:\n| a\nwhat is this", "not a rule"),
])
def test_mistakes_in_a_grammar_are_named(grammar, message):
    with pytest.raises(ValueError, match=message):
        Tales(grammar).listing()


def tales_py(*args):
    return subprocess.run([sys.executable, ROOT / "data" / "tales.py", *map(str, args)],
                          capture_output=True, text=True, timeout=60, cwd=ROOT / "tests")


def test_command_line(tmp_path):
    told = list(stories(3, seed=2))
    shown = tales_py("--n", 3, "--seed", 2)
    assert (shown.returncode, shown.stderr) == (0, "")
    assert shown.stdout == "".join(f"{text}\n[{-logp:.2f} nats]\n\n" for text, logp in told)
    file = tmp_path / "told.txt"
    texts = [text for text, _ in told] + ["No. He ran.\n"]
    file.write_text(f"\n{SEPARATOR}\n".join(texts))
    graded = tales_py("grade", file)
    rows = graded.stdout.splitlines()[1:]
    assert (graded.returncode, graded.stderr, len(rows)) == (0, "", 5)
    assert rows[0].split()[:5] == ["1", f"{-told[0][1]:.2f}", "1.000", "1.000", "1.000"]
    assert rows[3].split()[:2] == ["0", "inf"] and rows[4].split()[0] == "0.75"
    assert tales_py("grade", told[0][0]).stdout.splitlines()[1] == rows[0]
    shown = tales_py("entropy", "--n", 50).stdout
    assert re.fullmatch(r"\d\d\.\d\d \+- \d\.\d\d nats per story\n", shown)


@pytest.mark.parametrize("args", [
    ["grade"], ["grade", "no_such_file.txt"], ["grade", "{folder}"], ["grade", "{bytes}"],
    ["grade", "{empty}"], ["entropy", "--n", "1"], ["--n", "few"], ["sing"]])
def test_command_line_mistakes(args, tmp_path):
    """One sentence on stderr, exit code 2, nothing on stdout."""
    (tmp_path / "bytes").write_bytes(b"\xff\xfe\x00 Once")
    (tmp_path / "empty").write_text(f" \n{SEPARATOR}\n")
    files = {"folder": tmp_path, "bytes": tmp_path / "bytes", "empty": tmp_path / "empty"}
    said = tales_py(*(arg.format(**files) for arg in args))
    assert said.returncode == 2 and said.stdout == ""
    assert said.stderr.startswith("error: ") and said.stderr.count("\n") == 1
