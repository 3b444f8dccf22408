"""Regular expressions for module names, from files that are not trusted.

`re` backtracks, which can take forever. Expressions that could are refused: those with
repeats inside repeats, and those with more ways to match than there is time for.
"""

import math
import re

LONGEST = 2000  # characters of an expression, or of a name
LIMIT = 10**9  # ways to match for one file: about ten seconds
TOKEN = re.compile(
    r"""(?P<repeat>[*+]\??|\{\d+(?:,\d*)?\}\??)(?![?*+{])|(?P<option>\?\??)(?![?*+{])
    |(?P<open>\((?:\?:)?)(?!\?)|(?P<close>\))|(?P<either>\|)
    |(?P<one>\\(?:[dDsSwW]|[^a-zA-Z0-9])|\[\^?\]?(?:\\.|[^\\\]])*\]|[^\\?*+()|])
    """,
    re.VERBOSE,
)
WORDS = re.compile(r"(?:\w|\\\.|-)*(?:\|(?:\w|\\\.|-)*)+")  # plain alternatives
ENDING = re.compile(r"(?:^|[^\\\w-])([\w-]+)$")


class Budget:
    """How many ways to match may still be tried for one file."""

    def __init__(self):
        self.ways = LIMIT

    def spend(self, ways):
        self.ways -= ways
        if self.ways < 0:
            raise ValueError(
                "The file's regular expressions for modules take too long to match. "
                "Give the modules' names instead: '^' and the whole name, escaped."
            )


class Pattern:
    """An expression that `re` matches in bounded time."""

    def __init__(self, expression, budget):
        budget.spend(len(expression))
        try:
            if len(expression) > LONGEST:
                raise ValueError(f"it is longer than {LONGEST} characters")
            self.repeats, self.choices = ways(expression)
            self.compiled = re.compile(expression)
        except (ValueError, OverflowError, RecursionError, re.error) as error:
            raise ValueError(
                f"{expression[:99]!r} is not a regular expression of the simple kind "
                f"that is read from files: {error}."
            ) from error
        ending = ENDING.search(expression)
        self.ending = ending[1] if ending and "|" not in expression else ""
        self.budget = budget

    def matches(self, name, part=False):
        """Whether it matches the whole name, or with `part` the end after a dot."""
        if not name.endswith(self.ending):
            return False
        starts = [0, *(dot.end() for dot in re.finditer(r"\.", name) if part)]
        ways = self.choices * math.comb(len(name) + self.repeats, self.repeats)
        self.budget.spend(len(starts) * ways)
        return any(self.compiled.fullmatch(name, start) for start in starts)


def ways(expression):
    """Returns the number of repeats and the product of the choices of an expression.

    As no repeat holds another repeat or a choice, a name of n characters has at most
    choices * comb(n + repeats, repeats) ways to match.
    """
    groups, closed, position = [[0, 0, 1]], None, 0  # start, repeats, choices
    while position < len(expression):
        token = TOKEN.match(expression, position)
        if token is None:
            raise ValueError(
                f"{expression[position : position + 9]!r} is not supported"
            )
        if token["repeat"]:
            if closed and (closed[1] or closed[2] > 1):
                raise ValueError("a repeated group holds a repeat or a choice")
            groups[-1][1] += 1
        elif token["option"]:
            groups[-1][2] *= 2
        elif token["either"]:
            groups[-1].append(position)
        elif token["open"]:
            groups.append([token.end(), 0, 1])
        closed = None
        if token["close"]:
            if len(groups) == 1:
                raise ValueError("unbalanced parenthesis")
            closed = groups.pop()
            closed[2] *= choices(expression[closed[0] : position], len(closed) - 3)
            groups[-1][1] += closed[1]
            groups[-1][2] *= closed[2]
        position = token.end()
    (start, repeats, product, *bars), *_ = groups
    return repeats, product * choices(expression[start:], len(bars))


def choices(text, bars):
    """Returns how many alternatives of a text can match at one position of a name."""
    if not bars or not WORDS.fullmatch(text):
        return 1 + bars
    words = text.split("|")
    return max(sum(word.startswith(other) for other in words) for word in words)
