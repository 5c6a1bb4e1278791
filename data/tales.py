"""Tales: an endless corpus of small stories whose exact probability is known.

The corpus is a program. `tales.txt` is its grammar (the head of that file explains the rule
language) and this file is its interpreter. It draws a story with random choices; given a text, it
keeps the derivations that spell the text and adds up their probabilities; or it lists everything
that a small grammar can generate. So -log p(story) is exact, its mean is the entropy of the corpus,
and no language model of the corpus can do better.

    python data/tales.py [--n 5] [--seed 0]            tell stories, with their nats
    python data/tales.py grade "TEXT"                  or a FILE; <|endoftext|> divides stories
    python data/tales.py entropy [--n 20000]           nats per story, with the standard error
"""
import argparse
import hashlib
import math
import os
import random
import re
import sys
from bisect import bisect
from collections import defaultdict
from itertools import accumulate
from pathlib import Path

SKEW = 4          # option k = 0, 1, 2, ... of a choice and row k of a table weigh 1 / (k + SKEW)
INTERPRETER = 1   # part of the version: raise it when the same grammar would tell other stories
SEPARATOR = "<|endoftext|>"
MOST, CROWD = 40, 100  # grade: sentences read, and readings kept of them; a story needs 20 and few


# ---- the grammar is a tree of these ------------------------------------------------------------
# A state is (text so far, {variable: row}, log p, mark). The mark is what the next word needs
# before it: "" nothing, " " or "\n" the start of a sentence or paragraph, a final "a" an article.
# node.walk(states, run) takes states through the node and returns those that arrive.

class Run:
    """How to walk: by random choices (rng), along a text (target), or, with neither, every way.
    `free` allows to guess a variable that is not set. `reach`: the characters of target spelt."""

    def __init__(self, rng=None, target=None, free=False):
        self.rng, self.target, self.free, self.reach = rng, target, free, 0


class Lit:
    """Words to say. Spaces between sentences, capitals and a/an are decided here and only here."""

    def __init__(self, words):
        self.words = words

    def walk(self, states, run):
        out, target = [], run.target
        for text, env, logp, mark in states:
            words, start = self.words, len(text)
            if mark[-1:] == "a":
                words, mark = ("an " if words[0] in "aeiou" else "a ") + words, mark[:-1]
            # an opening quote wants a capital; '!" ' does not: "Help!" cried Tom
            if mark or text[-2:] in ("", '"', ' "', '\n"', ". ", "! ", "? "):
                words = (mark if text else "") + words[0].upper() + words[1:]
            if target is None or target.startswith(words, start):
                out.append((text + words, env, logp, ""))
            elif start + len(words) > run.reach:  # a dead end, but how far did it get?
                same = os.path.commonprefix([words, target[start:start + len(words)]])
                run.reach = max(run.reach, start + len(same))
        return out


class Mark:
    """{a}, {p}, or the gap before a line: something that goes before the next word."""

    def __init__(self, mark):
        self.mark = mark

    def walk(self, states, run):
        return [(text, env, logp, mark + "a" if self.mark == "a" else self.mark)
                for text, env, logp, mark in states]


class Seq:
    """One part after the other."""

    def __init__(self, parts):
        self.parts = parts

    def walk(self, states, run):
        for part in self.parts:
            states = part.walk(states, run)
        return states


def positional(n):
    """The normalised weights 1 / (k + SKEW) of n options."""
    total = math.fsum(1 / (k + SKEW) for k in range(n))
    return [1 / (k + SKEW) / total for k in range(n)]


class Alt:
    """(x|y|z), or the alternatives of a block: one of the options."""

    def __init__(self, options):
        p = positional(len(options))
        self.options, self.logp = options, [math.log(x) for x in p]
        self.cumulative = list(accumulate(p))[:-1]

    def walk(self, states, run):
        if not states:
            return states
        picks = (bisect(self.cumulative, run.rng.random()),) if run.rng else range(len(self.logp))
        return [arrived for k in picks for arrived in self.options[k].walk(
            [(text, env, logp + self.logp[k], mark) for text, env, logp, mark in states], run)]


class Row(dict):
    """A row of a table, {column: node}, its first cell also as "". Equal to itself alone."""
    __eq__, __hash__ = object.__eq__, object.__hash__


class Bind:
    """{v:t1|t2}: let variable v hold a row that no variable holds yet; the probabilities of the
    rows that are left are renormalised."""

    def __init__(self, var, tables):
        self.var, self.p = var, {}
        for share, rows in zip(positional(len(tables)), tables):
            self.p |= {row: share * p for row, p in zip(rows, positional(len(rows)))}
        self.rows, self.cumulative = list(self.p), list(accumulate(self.p.values()))[:-1]

    def walk(self, states, run):
        out = []
        for text, env, logp, mark in states:
            if self.var in env:
                if not run.free:
                    raise ValueError(f"variable '{self.var}' is chosen twice in one story")
                out.append((text, env, logp, mark))
                continue
            used = [row for row in env.values() if row in self.p]
            if len(used) == len(self.p):
                raise ValueError(f"no row is left for variable '{self.var}'")
            left = 1 - math.fsum(self.p[row] for row in used)
            out += [(text, {**env, self.var: row}, logp + math.log(self.p[row] / left), mark)
                    for row in ([self.draw(run.rng, used)] if run.rng else self.rows)
                    if row not in used]
        return out

    def draw(self, rng, used):
        while (row := self.rows[bisect(self.cumulative, rng.random())]) in used:
            pass               # drawing again is the renormalised distribution, without new sums
        return row


class Get:
    """{v} or {v.column}: say a cell of the row that v holds. guesses: all rows v could hold."""

    def __init__(self, var, column, guesses):
        self.var, self.column, self.guesses = var, column, guesses

    def walk(self, states, run):
        out = []
        for text, env, logp, mark in states:
            if self.var in env:
                out += env[self.var][self.column].walk([(text, env, logp, mark)], run)
            elif run.free:
                out += [arrived for row in self.guesses[self.var] if row not in env.values()
                        for arrived in row[self.column].walk(
                            [(text, {**env, self.var: row}, logp, mark)], run)]
            else:
                raise ValueError(f"variable '{self.var}' is said before it is chosen")
        return out


# ---- a grammar, and what follows from it -------------------------------------------------------

class Tales:
    """A grammar and what follows from it: stories, their exact log p, and grades of any text.

    source: grammar text (None: the corpus, data/tales.txt). Every log p is in nats. ValueError: the
    grammar cannot be read, or uses a variable wrongly. version: changes whenever stories do."""

    def __init__(self, source=None):
        if source is None:
            source = Path(__file__).with_suffix(".txt").read_text(encoding="ascii")
        self.version = hashlib.sha256(f"{INTERPRETER} {SKEW} {source}".encode()).hexdigest()[:12]
        self.rules, self.tables, self.guesses, self.sentences = {}, {}, {}, []
        # 1. name every rule and every row, still empty, so that each can mention any other
        source = re.sub(r"(?m)^#.*\n", "", source + "\n")
        source = re.sub(r"\n {4,}", " ", re.sub(r"\n {4,}(?=[|;])", "", source))
        bodies, says = {}, []
        for block in re.split(r"\n(?=[^\s|])", source.strip()):
            head = re.match(r"(\w+)(\([^)\n]*\)| =|:)(.*)", block, re.S)
            if not head or head[1] in bodies:
                raise ValueError(f"not a rule, or its name is taken: '{block.splitlines()[0]}'")
            name, kind, body = head[1], head[2], head[3].strip()
            bodies[name] = kind, body
            if kind in (" =", ":"):
                self.rules[name] = Seq([])
            else:
                self.tables[name] = [Row() for _ in re.split(r" / |\n", body)]
        # 2. fill them
        for name, (kind, body) in bodies.items():
            if kind == " =":
                self.rules[name].parts = [self._phrase(body, says)]
            elif kind == ":":
                blocks = [block.strip() for block in re.split(r"(?m)^\|", body) if block.strip()]
                self.rules[name].parts = [choice([
                    Seq([self._line(line, says) for line in block.split("\n")])
                    for block in blocks])]
            else:
                columns = [column.strip().partition("=") for column in kind[1:-1].split(";")]
                for row, text in zip(self.tables[name], re.split(r" / |\n", body)):
                    cells = text.split(";") + [""] * len(columns)
                    for (column, _, default), cell in zip(columns, cells):
                        row[column] = self._phrase(cell.strip() or default, says)
                    row[""] = row[columns[0][0]]
        # 3. mistakes that would be hard to find later
        if both := self.rules.keys() & self.guesses.keys():
            raise ValueError(f"both a rule and a variable: {', '.join(sorted(both))}")
        for get in says:
            if not all(get.column in row for row in self.guesses.get(get.var, [{}])):
                raise ValueError(f"'{get.var}' is no rule or variable with a cell '{get.column}'")

    def _line(self, text, says):
        node = Seq([Mark(" "), self._phrase(text, says)])
        if re.sub(r"\{.*?\}|[\s()|]", "", text):  # it has words of its own: a sentence for grade
            self.sentences.append(node)
        return node

    def _phrase(self, text, says):
        tokens = iter(re.findall(r"[()|]|\{.*?\}|[^(){|]+", " ".join(text.split())) + [")"])

        def parse():                              # up to the bracket that closes this one
            options = [[]]
            for token in tokens:
                if token == ")":
                    return choice([Seq(parts) for parts in options])
                if token == "|":
                    options.append([])
                elif token == "(":
                    options[-1].append(parse())
                elif token[0] == "{":
                    options[-1].append(self._slot(token[1:-1], says))
                else:
                    options[-1].append(Lit(token.replace("~", " ")))
            raise ValueError(f"a bracket is left open in '{text}'")

        node = parse()
        if next(tokens, None):
            raise ValueError(f"a bracket too many in '{text}'")
        return node

    def _slot(self, text, says):
        if text in ("a", "p"):
            return Mark("a" if text == "a" else "\n")
        if text in self.rules:
            return self.rules[text]
        if ":" not in text:
            says.append(Get(*text.partition(".")[::2], self.guesses))
            return says[-1]
        var, names = text.split(":")
        if unknown := set(names.split("|")) - self.tables.keys():
            raise ValueError(f"no table '{unknown.pop()}' for variable '{var}'")
        bind = Bind(var, [self.tables[name] for name in names.split("|")])
        self.guesses[var] = list(dict.fromkeys(self.guesses.get(var, []) + bind.rows))
        return bind

    def _walk(self, run):
        return self.rules["story"].walk([("", {}, 0.0, "")], run)

    def sample(self, rng):
        """One story: (text, log p in nats). rng needs only .random() -> [0, 1)."""
        (text, _, logp, _), = self._walk(Run(rng=rng))
        return text, logp

    def listing(self):
        """{text: p} of everything the grammar can say: for small grammars only."""
        p = defaultdict(float)
        for text, _, logp, _ in self._walk(Run()):
            p[text] += math.exp(logp)
        return dict(p)

    def _score(self, text):                       # -> log p of each derivation, characters spelt
        run = Run(target=text)
        ends = self._walk(run)
        reach = max([run.reach] + [len(end[0]) for end in ends])
        return [logp for said, _, logp, _ in ends if said == text], reach

    def derivations(self, text):
        """In how many ways the grammar can tell the text (0: it cannot)."""
        return len(self._score(text)[0])

    def logp(self, text):
        """Exact log p(text) in nats, summed over all derivations; -inf if there is none."""
        return logsumexp(self._score(text)[0])

    def grade(self, text):
        """How close a text is to the stories of this grammar, as a dictionary.

        valid: the grammar can generate the text; logp: its log p in nats, -inf if it is not valid;
        prefix: the longest beginning that some story has, as a share of the characters;
        valid_sentences: the share of sentences that occur in some story; consistent: the share of
        sentences that also fit the names, pronouns, things and traits of those before them."""
        logps, reach = self._score(text)
        pos, envs, valid, consistent, total = 0, [{}], 0, 0, 0
        end = re.compile(r'[.!?]"?(?=\s|$)')
        while pos < len(text):
            if total == MOST:                     # no story is so long: the rest is not valid
                total += len(end.findall(text, pos))
                break
            fits = self._readings(text, pos, envs)
            ends = fits or self._readings(text, pos, [{}])
            valid, consistent, total = valid + bool(ends), consistent + bool(fits), total + 1
            if fits:                              # the longest reading, in all its meanings
                envs = list(fits[max(fits)].values())[:CROWD]
            stop = end.search(text, pos + 1)
            pos = max(ends) if ends else stop.end() if stop else len(text)
        return dict(valid=bool(logps), logp=logsumexp(logps), prefix=reach / max(1, len(text)),
                    valid_sentences=valid / max(1, total), consistent=consistent / max(1, total))

    def _readings(self, text, pos, envs):         # of one sentence: {where it ends: {set: env}}
        ends, run = {}, Run(target=text, free=True)
        states = [(text[:pos], env, 0.0, "") for env in envs]
        for sentence in self.sentences:
            for said, env, _, _ in sentence.walk(states, run):
                if len(said) > pos and text[len(said):len(said) + 1] in ("", " ", "\n"):
                    ends.setdefault(len(said), {})[frozenset(env.items())] = env
        return ends


def choice(options):
    return Alt(options) if len(options) > 1 else options[0]


def logsumexp(logps):
    top = max(logps, default=-math.inf)
    return top + math.log(math.fsum(math.exp(x - top) for x in logps)) if logps else top


def stories(n, seed=0, tales=None, start=0):
    """Yield the stories start ... start + n - 1 of a seed as (text, log p in nats). Story i is a
    function of (seed, i) and the grammar alone, so ranges can be told apart and in any order."""
    tales = tales or Tales()
    for i in range(start, start + n):
        yield tales.sample(random.Random(f"{seed}/{i}"))


def entropy(n=20000, seed=0, tales=None):
    """(H, standard error) of the corpus in nats per story: the mean of -log p over n stories."""
    nats = [-logp for _, logp in stories(n, seed, tales)]
    mean = math.fsum(nats) / n
    return mean, math.sqrt(math.fsum((x - mean) ** 2 for x in nats) / (n - 1) / n)


def grade(texts, tales=None):
    """Grade texts with Tales.grade. Returns valid_stories (the share of valid texts), the means of
    prefix, valid_sentences and consistent over all texts, and true_nll, the mean of -log p in nats
    over the valid ones, None if no text is valid."""
    tales = tales or Tales()
    grades = [tales.grade(text) for text in texts]
    nats = [-g["logp"] for g in grades if g["valid"]]
    n = max(1, len(grades))
    means = {key: math.fsum(g[key] for g in grades) / n
             for key in ("prefix", "valid_sentences", "consistent")}
    return dict(valid_stories=len(nats) / n, **means,
                true_nll=math.fsum(nats) / len(nats) if nats else None)


# ---- command line ------------------------------------------------------------------------------

class Parser(argparse.ArgumentParser):
    def error(self, message):
        self.exit(2, f"error: {message}\n")


def read_texts(what, error):
    """TEXT or FILE -> its texts; error(message) ends the program."""
    if os.path.isfile(what):
        try:
            what = Path(what).read_text(encoding="utf-8")
        except (UnicodeDecodeError, OSError):
            error(f"cannot read {what}: is it UTF-8 text?")
    elif os.path.isdir(what) or re.search(r"^\S+$|\.\w+$", what):
        error(f"there is no file {what}; put a text to grade in quotes")
    texts = [text.strip() for text in what.split(SEPARATOR) if text.strip()]
    return texts or error("there is no text to grade")


def main(argv=None):
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", nargs="?", default="tell", choices=["tell", "grade", "entropy"])
    parser.add_argument("what", nargs="?", help="grade: a text in quotes, or a file")
    parser.add_argument("--n", type=int, help="stories (tell: 5, entropy: 20000)")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    if (args.command == "grade") != (args.what is not None):
        parser.error("grade needs a text in quotes or a file; nothing else takes one")
    if args.n is not None and args.n < (least := 2 if args.command == "entropy" else 1):
        parser.error(f"--n is {args.n}, it must be at least {least}")
    if args.command == "tell":
        for text, logp in stories(args.n or 5, args.seed):
            print(f"{text}\n[{-logp:.2f} nats]\n")
    elif args.command == "entropy":
        print("{:.2f} +- {:.2f} nats per story".format(*entropy(args.n or 20000, args.seed)))
    else:
        texts, tales, grades = read_texts(args.what, parser.error), Tales(), []
        print("valid    nats  prefix  valid_sentences  consistent")
        shares = "{prefix:7.3f} {valid_sentences:16.3f} {consistent:11.3f} "
        for text in texts:
            grades.append(g := tales.grade(text))
            print("{valid:5d} {0:7.2f}".format(-g["logp"], **g), shares.format(**g),
                  " ".join(text.split())[:48])
        mean = {key: sum(g[key] for g in grades) / len(grades) for key in grades[0]}
        print(f"{mean['valid']:5.2f} {'':7}", shares.format(**mean), f"mean of {len(grades)}")


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))     # `python data/tales.py`
    from data.files import run_main
    run_main(main)
