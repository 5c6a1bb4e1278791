"""Tales: an endless corpus of small stories whose exact probability is known.

The corpus is a program: `tales.txt` is a grammar (its head explains the rule language), and this
file is the one interpreter of it. Walking through the grammar with a coin writes a story; with a
text in hand it keeps only the walks that spell the text and adds up their probabilities; with
neither it lists everything a small grammar can say. So -log p(story) is exact, its mean is the
entropy of the corpus, and no language model can do better.

    python data/tales.py [--n 5] [--seed 0]            stories, with their nats
    python data/tales.py judge "TEXT"                  or a file; stories divided by <|endoftext|>
    python data/tales.py entropy [--n 20000]           nats per story, with the standard error
"""
import argparse
import hashlib
import math
import os
import random
import re
from bisect import bisect
from collections import defaultdict
from itertools import accumulate
from pathlib import Path

SKEW = 4          # option k = 0, 1, 2, ... of a choice and row k of a table weigh 1 / (k + SKEW)
INTERPRETER = 1   # part of the version: raise it when the same grammar would give other stories
SEPARATOR = "<|endoftext|>"
LONGEST = 2000    # characters that judge reads sentence by sentence; no story comes near
CROWD = 100       # readings that judge keeps of what it has read so far; a story needs few


# ---- the grammar as a tree ---------------------------------------------------------------------
# A state is (text so far, bindings {variable: row}, log p, mark). The mark is what the next word
# owes: "" nothing, " " or "\n" the start of a sentence or paragraph, and a final "a" an article.
# node.walk(states, run) follows every state through the node: one state if run.rng tosses the
# coin, else all that are possible, or all that spell run.target.

def positional(n):
    """The weights 1/(k + SKEW) of n options in their order, normalised."""
    weights = [1 / (k + SKEW) for k in range(n)]
    total = math.fsum(weights)
    return [w / total for w in weights]


class Lit:
    """Words to say. Spaces between sentences, capitals and a/an are decided here and only here."""

    def __init__(self, words):
        self.words = words

    def walk(self, states, run):
        out, target = [], run.target
        for text, env, logp, mark in states:
            words = self.words
            if mark[-1:] == "a":
                words, mark = ("an " if words[0] in "aeiou" else "a ") + words, mark[:-1]
            # '." ' ends a quoted sentence inside a line, so only an opening quote wants a capital
            if mark or text[-2:] in ("", '"', ' "', '\n"', ". ", "! ", "? "):
                words = (mark if text else "") + words[0].upper() + words[1:]
            if target is None or target.startswith(words, len(text)):
                out.append((text + words, env, logp, ""))
            elif len(text) + len(words) > run.reach:
                run.reach = max(run.reach, len(text) + len(os.path.commonprefix(
                    [words, target[len(text):len(text) + len(words)]])))
        return out


class Mark:
    """{a}, {p}, or the gap before a line: what the next word owes."""

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


class Alt:
    """(x|y|z), or the alternatives of a block."""

    def __init__(self, options):
        self.options, p = options, positional(len(options))
        self.logp, self.cumulative = [math.log(x) for x in p], list(accumulate(p[:-1]))

    def walk(self, states, run):
        if not states:
            return states
        picks = (bisect(self.cumulative, run.rng.random()),) if run.rng else range(len(self.options))
        return [end for k in picks for end in self.options[k].walk(
            [(text, env, logp + self.logp[k], mark) for text, env, logp, mark in states], run)]


class Row(dict):
    """One row of a table, {column: node}, "" being the first; equal to itself alone."""
    __eq__, __hash__ = object.__eq__, object.__hash__


class Bind:
    """{v:t1|t2}: choose a row that no variable holds yet, p renormalised over those that are left."""

    def __init__(self, var, tables):
        self.var, parts = var, list(zip(positional(len(tables)), tables))
        self.p = {row: share * p for share, rows in parts for row, p in zip(rows, positional(len(rows)))}
        self.rows, self.cumulative = list(self.p), list(accumulate(self.p.values()))[:-1]

    def walk(self, states, run):
        out = []
        for state in states:
            text, env, logp, mark = state
            if self.var in env:
                if not run.free:
                    raise ValueError(f"the grammar chooses variable '{self.var}' twice in one story")
                out.append(state)
                continue
            used = [row for row in env.values() if row in self.p]
            if len(used) == len(self.rows):
                raise ValueError(f"the grammar has no row left for variable '{self.var}'")
            left = 1 - math.fsum(self.p[row] for row in used) if used else 1.0
            rows = [row for row in self.rows if row not in used] if not run.rng else ()
            while run.rng and not rows:        # rejection draws from the renormalised law exactly
                row = self.rows[bisect(self.cumulative, run.rng.random())]
                rows = (row,) if row not in used else ()
            out += [(text, {**env, self.var: row}, logp + math.log(self.p[row] / left), mark)
                    for row in rows]
        return out


class Get:
    """{v} or {v.column}: say a cell of the row that variable v holds."""

    def __init__(self, var, column, guesses):
        self.var, self.column, self.guesses = var, column, guesses

    def walk(self, states, run):
        out = []
        for state in states:
            text, env, logp, mark = state
            if self.var in env:
                out += env[self.var][self.column].walk([state], run)
            elif run.free:                     # judge has not seen it: which row could it be?
                for row in self.guesses[self.var]:
                    if row not in env.values():
                        out += row[self.column].walk([(text, {**env, self.var: row}, logp, mark)], run)
            else:
                raise ValueError(f"the grammar says variable '{self.var}' before it chooses a row")
        return out


class Run:
    """How to walk: with a coin (rng), along a text (target), or everywhere. `free` lets variables
    that no earlier sentence has set be guessed; `reach` is the furthest character of the target read."""

    def __init__(self, rng=None, target=None, free=False):
        self.rng, self.target, self.free, self.reach = rng, target, free, 0


START = ("", {}, 0.0, "")


class Tales:
    """A grammar and what follows from it: stories, their exact log p, and a judge of any text.

    source: grammar text (None: the corpus, data/tales.txt). A grammar that cannot be read raises
    ValueError. Every log p is in nats."""

    def __init__(self, source=None):
        if source is None:
            source = Path(__file__).with_suffix(".txt").read_text(encoding="ascii")
        self.version = hashlib.sha256(f"{INTERPRETER} {SKEW} {source}".encode()).hexdigest()[:12]
        self.rules, self.tables, self.guesses, self.sentences, self._said = {}, {}, {}, [], []
        # 1. name every rule and every row, still empty, so that each may mention any other
        source = re.sub(r"(?m)^#.*\n", "", source + "\n")
        source = re.sub(r"\n {4,}", " ", re.sub(r"\n {4,}(?=[|;])", "", source))
        bodies = {}
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
                self.rules[name].parts = [self._phrase(body)]
            elif kind == ":":
                self.rules[name].parts = [self._choice([
                    Seq([self._line(line) for line in block.strip().split("\n")])
                    for block in re.split(r"(?m)^\|", body) if block.strip()])]
            else:
                columns = [c.strip().partition("=") for c in kind[1:-1].split(";")]
                for row, text in zip(self.tables[name], re.split(r" / |\n", body)):
                    cells = text.split(";") + [""] * len(columns)
                    for (column, _, default), cell in zip(columns, cells):
                        row[column] = self._phrase(cell.strip() or default)
                    row[""] = row[columns[0][0]]
        # 3. mistakes that would be hard to find later
        if both := self.rules.keys() & self.guesses.keys():
            raise ValueError(f"both a rule and a variable: {', '.join(sorted(both))}")
        for get in self._said:
            if not all(get.column in row for row in self.guesses.get(get.var, [{}])):
                raise ValueError(f"nothing gives '{get.var}.{get.column}' a meaning")

    def _line(self, text):
        node = Seq([Mark(" "), self._phrase(text)])
        if re.sub(r"\{.*?\}|[\s()|]", "", text):         # it has words of its own: judge knows it
            self.sentences.append(node)
        return node

    def _choice(self, options):
        return Alt(options) if len(options) > 1 else options[0]

    def _phrase(self, text):
        tokens = iter(re.findall(r"[()|]|\{.*?\}|[^(){|]+", " ".join(text.split())) + [")"])

        def parse():                                     # up to the bracket that closes this one
            options = [[]]
            for token in tokens:
                if token == ")":
                    return self._choice([part[0] if len(part) == 1 else Seq(part) for part in options])
                if token == "|":
                    options.append([])
                elif token == "(":
                    options[-1].append(parse())
                else:
                    options[-1].append(self._slot(token[1:-1]) if token[0] == "{"
                                       else Lit(token.replace("~", " ")))
            raise ValueError(f"a bracket is left open in '{text}'")

        node = parse()
        if next(tokens, None):
            raise ValueError(f"a bracket too many in '{text}'")
        return node

    def _slot(self, text):
        if text in ("a", "p"):
            return Mark("a" if text == "a" else "\n")
        if text in self.rules:
            return self.rules[text]
        if ":" not in text:
            self._said.append(Get(*text.partition(".")[::2], self.guesses))
            return self._said[-1]
        var, names = text.split(":")
        if unknown := set(names.split("|")) - self.tables.keys():
            raise ValueError(f"no table '{unknown.pop()}' for variable '{var}'")
        bind = Bind(var, [self.tables[name] for name in names.split("|")])
        self.guesses[var] = list(dict.fromkeys(self.guesses.get(var, []) + bind.rows))
        return bind

    # ---- what it is for ------------------------------------------------------------------------

    def sample(self, rng):
        """One story: (text, log p of the derivation). rng needs only .random() -> [0, 1)."""
        (text, _, logp, _), = self.rules["story"].walk([START], Run(rng=rng))
        return text, logp

    def _score(self, text):                              # -> log p of every derivation, reach
        run = Run(target=text)
        ends = self.rules["story"].walk([START], run)
        reach = max([run.reach] + [len(end[0]) for end in ends])
        return [logp for said, _, logp, _ in ends if said == text], reach

    def derivations(self, text):
        """The number of ways in which the grammar can tell the text (0: it cannot)."""
        return len(self._score(text)[0])

    def logp(self, text):
        """Exact log p(text) in nats, summed over all derivations; -inf if there is none."""
        return logsumexp(self._score(text)[0])

    def listing(self):
        """{text: p} of everything the grammar can say. Only for small grammars: nothing is pruned."""
        p = defaultdict(float)
        for text, _, logp, _ in self.rules["story"].walk([START], Run()):
            p[text] += math.exp(logp)
        return dict(p)

    def judge(self, text):
        """How far a text is from a story of this grammar.

        valid: p > 0; logp: its log p in nats; prefix: share of the text that is the beginning of
        some story; known: share of its sentences that some story contains; agree: share that fit
        what the sentences before them have said of names, pronouns, things and tempers."""
        logps, reach = self._score(text)
        pos, envs, known, agree, total = 0, [{}], 0, 0, 0
        while pos < len(text):
            total += 1
            if pos > LONGEST:                            # not a story: do not read on for ever
                total += len(re.findall(r"[.!?]", text[pos:]))
                break
            fits = self._readings(text, pos, envs)
            ends = fits or self._readings(text, pos, [{}])
            known, agree = known + bool(ends), agree + bool(fits)
            if fits:                                     # the longest reading, in all its meanings
                envs = list(fits[max(fits)].values())[:CROWD]
            stop = re.compile(r'[.!?]"?(?=\s|$)').search(text, pos + 1)
            pos = max(ends) if ends else stop.end() if stop else len(text)
        return dict(valid=bool(logps), logp=logsumexp(logps), prefix=reach / max(1, len(text)),
                    known=known / max(1, total), agree=agree / max(1, total))

    def _readings(self, text, pos, envs):                # -> {end: {what is bound: env}}
        ends, run = {}, Run(target=text, free=True)
        states = [(text[:pos], env, 0.0, "") for env in envs]
        for sentence in self.sentences:
            for said, env, _, _ in sentence.walk(states, run):
                if len(said) > pos and text[len(said):len(said) + 1] in ("", " ", "\n"):
                    ends.setdefault(len(said), {})[frozenset(env.items())] = env
        return ends


def logsumexp(logps):
    top = max(logps, default=-math.inf)
    return top + math.log(math.fsum(math.exp(x - top) for x in logps)) if logps else top


def stories(n, seed=0, tales=None, start=0):
    """Yield the stories start ... start + n - 1 of a seed as (text, log p in nats). Story i is a
    function of (seed, i) and the grammar alone, so ranges can be made apart and in any order."""
    tales = tales or Tales()
    for i in range(start, start + n):
        yield tales.sample(random.Random(f"{seed}/{i}"))


def entropy(n=20000, seed=0, tales=None):
    """(H, standard error) of the corpus in nats per story: the mean of -log p over n stories."""
    nats = [-logp for _, logp in stories(n, seed, tales)]
    mean = math.fsum(nats) / n
    return mean, math.sqrt(math.fsum((x - mean) ** 2 for x in nats) / (n - 1) / n)


# ---- command line ------------------------------------------------------------------------------

class Parser(argparse.ArgumentParser):
    def error(self, message):                            # the user's mistake: one sentence, no usage
        self.exit(2, f"error: {message}\n")


def read_texts(what, error):
    """TEXT or FILE -> the texts in it."""
    if os.path.isfile(what):
        try:
            what = Path(what).read_text(encoding="utf-8")
        except (UnicodeDecodeError, OSError) as problem:
            error(f"cannot read {what} as UTF-8 text ({problem.__class__.__name__})")
    elif os.path.isdir(what) or re.search(r"^\S+$|\.\w+$", what):
        error(f"there is no file {what} (a text to judge is put in quotes)")
    texts = [text.strip() for text in what.split(SEPARATOR)]
    return [text for text in texts if text] or error("there is no text to judge")


def main(argv=None):
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", nargs="?", default="sample", choices=["sample", "judge", "entropy"])
    parser.add_argument("what", nargs="?", help="judge: a text in quotes, or a file")
    parser.add_argument("--n", type=int, help="number of stories (sample: 5, entropy: 20000)")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    if (args.command == "judge") != (args.what is not None):
        parser.error("judge needs one text or file" if args.what is None else
                     f"{args.command} takes no text, only judge does")
    if args.n is not None and args.n < (2 if args.command == "entropy" else 1):
        parser.error(f"--n {args.n} is too small")
    if args.command == "sample":
        for text, logp in stories(args.n or 5, args.seed):
            print(f"{text}\n[{-logp:.2f} nats]\n")
    elif args.command == "entropy":
        print("{:.2f} +- {:.2f} nats per story".format(*entropy(args.n or 20000, args.seed)))
    else:
        tales, marks = Tales(), []
        print("valid    nats  prefix   known   agree")
        for text in read_texts(args.what, parser.error):
            marks.append(mark := tales.judge(text))
            print("{valid:5d} {nats:7.2f} {prefix:7.3f} {known:7.3f} {agree:7.3f}".format(
                nats=-mark["logp"], **mark), " ".join(text.split())[:48])
        mean = {k: sum(m[k] for m in marks) / len(marks) for k in ("valid", "prefix", "known", "agree")}
        print("{valid:5.2f}         {prefix:7.3f} {known:7.3f} {agree:7.3f}".format(**mean),
              f"mean of {len(marks)}")


if __name__ == "__main__":
    try:
        main()
    except BrokenPipeError:                              # ... | head
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
