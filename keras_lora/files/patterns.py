"""Expressions of a file, which anybody may have written, for names of modules.

Python's own matcher tries one way after another, for ever if an expression is made so.
Here all places that a match can have reached are followed at once, as the bits of a
number, and steps are counted: a file takes bounded time.
"""

import re

STEPS = 10_000_000  # some ten seconds
LONGEST = 2000
TOKEN = re.compile(
    r"""(?P<repeat>[*+?]|\{(?P<low>\d+)(?P<upto>,(?P<high>\d*))?\})\??(?![+*?])
    |(?P<open>\((?:\?:)?)|(?P<close>\))|(?P<either>\|)|(?P<start>\^)|(?P<end>\$)
    |(?P<text>[\w/-]+(?![*+?{]))
    |(?P<one>\\(?:[dDsSwW]|[^a-zA-Z0-9])|\[\^?\]?(?:\\.|[^\\\]])*\]|[^\\*+?])
    """,
    re.VERBOSE,
)


class Budget:
    """What one file may take."""

    def __init__(self):
        self.steps = STEPS

    def spend(self, steps=1):
        self.steps -= steps
        if self.steps < 0:
            raise ValueError(
                "The file's expressions for modules take too long to match. Give the "
                "modules' names instead: '^' and the whole name, escaped."
            )


class Name:
    """A module's name, and where in it something stands."""

    def __init__(self, text, budget):
        self.text, self.budget, self.found = text, budget, {}
        self.start, self.end = 1, 1 << len(text)

    def places(self, token):
        """A bit for each place where the token, an expression without repeats, is."""
        self.budget.spend(1 + len(self.text) // 500)
        if token not in self.found:
            self.budget.spend(len(self.text))
            at = re.compile(token).match
            bits = (1 << p for p in range(len(self.text)) if at(self.text, p))
            self.found[token] = sum(bits)
        return self.found[token]

    def is_matched_by(self, expression, part=False):
        """part: the whole name, or what follows one of its dots."""
        self.budget.spend()
        if not self.text.endswith(expression.suffix):
            return False
        starts = self.start | (self.places(r"\.") << 1 if part else 0)
        return bool(expression(self, starts) & self.end)


def parse(expression, budget):
    """(name, bits of starts) -> bits of ends, as a function."""
    try:
        if len(expression) > LONGEST:
            raise ValueError(f"it is longer than {LONGEST} characters")
        tokens = tokens_of(expression, budget)
        choice = any(token["either"] for token in tokens)
        suffix = tokens[0]["text"] if tokens and not choice else None
        ends = alternatives(tokens)
        if tokens:
            raise ValueError("unbalanced parenthesis")
    except (ValueError, re.error, RecursionError) as error:
        raise ValueError(
            f"{expression[:99]!r} is not a regular expression of the simple kind that "
            f"is read from files: {error}."
        ) from error
    ends.suffix = suffix or ""  # most names are passed over by their last part
    return ends


def tokens_of(expression, budget):
    """Last first, as they are popped."""
    tokens, place = [], 0
    while place < len(expression):
        budget.spend(5)
        token = TOKEN.match(expression, place)
        if token is None:
            raise ValueError(f"{expression[place : place + 9]!r} is not read")
        re.compile(token["one"] or "")
        tokens.append(token)
        place = token.end()
    return tokens[::-1]


def alternatives(tokens):
    choices = [sequence(tokens)]
    while tokens and tokens[-1]["either"]:
        tokens.pop()
        choices.append(sequence(tokens))

    def ends(name, starts):
        found = 0
        for choice in choices:
            name.budget.spend()
            found |= choice(name, starts)
        return found

    return ends


def sequence(tokens):
    parts = []
    while tokens and not (tokens[-1]["either"] or tokens[-1]["close"]):
        token = tokens.pop()
        if token["open"]:
            part = alternatives(tokens)
            if not tokens:
                raise ValueError("missing )")
            tokens.pop()
        elif token["repeat"]:
            raise ValueError(f"nothing to repeat before {token[0]!r}")
        else:
            part = piece(token)
        if tokens and tokens[-1]["repeat"]:
            part = repeated(part, tokens.pop())
        parts.append(part)

    def ends(name, starts):
        for part in parts:
            starts = starts and part(name, starts)
        return starts

    return ends


def piece(token):
    if token["start"]:
        return lambda name, starts: starts & name.start
    if token["end"]:
        return lambda name, starts: starts & name.end
    size = len(token["text"] or "1")
    what = re.escape(token["text"]) if token["text"] else token["one"]
    return lambda name, starts: (starts & name.places(what)) << size


def repeated(part, token):
    low, high = {"*": (0, None), "+": (1, None), "?": (0, 1)}.get(
        token["repeat"], (int(token["low"] or 0), int(token["high"] or 0) or None)
    )
    if token["low"] and not token["upto"]:
        high = low

    def ends(name, starts):
        for _ in range(low):
            before, starts = starts, part(name, starts)
            if starts == before:  # and so for ever; none at all among them
                break
        found = frontier = starts
        count = low
        while frontier and (high is None or count < high):
            frontier = part(name, frontier) & ~found
            found |= frontier
            count += 1
        return found

    return ends
