"""How answers are scored: token F1 and Rouge-L, as the benchmarks' own code computes them; and how
sure a share of right ones is.

Sources:
    [1] Rajpurkar et al., "SQuAD", 2016: token F1
    [2] Lin, "ROUGE: A Package for Automatic Evaluation of Summaries", 2004, section 3.2: Rouge-L of
        summaries; and the PyPI package rouge 1.0.1, which LongBench scores with
"""

import math
import re
import string
from collections import Counter


def normalize(text: str) -> list[str]:
    """The words that count in [1]: lowercase, without ASCII punctuation, without a, an, the."""
    text = "".join(c for c in text.lower() if c not in string.punctuation)
    return re.sub(r"\b(a|an|the)\b", " ", text).split()


def f1(output: str, answer: str) -> float:
    """Token F1 [1]: 2 P R / (P + R) of the words in common, counted as often as both have them.

    With c words in common of n and m, P = c / n and R = c / m make it 2 c / (n + m).
    """
    ours, theirs = normalize(output), normalize(answer)
    common = (Counter(ours) & Counter(theirs)).total()
    return 2 * common / (len(ours) + len(theirs)) if common else 0.0


def lcs(x: list[str], y: list[str]) -> list[str]:
    """A longest common subsequence of x and y; of several, the one that `rouge` finds."""
    length = [[0] * (len(y) + 1) for _ in range(len(x) + 1)]  # of x[:i] and y[:j]
    for i, a in enumerate(x):
        for j, b in enumerate(y):
            longer = length[i][j] + 1 if a == b else max(length[i][j + 1], length[i + 1][j])
            length[i + 1][j + 1] = longer
    words, i, j = [], len(x), len(y)
    while i and j:
        if x[i - 1] == y[j - 1]:
            i, j = i - 1, j - 1
            words.append(x[i])
        elif length[i - 1][j] > length[i][j - 1]:
            i -= 1
        else:
            j -= 1
    return words[::-1]


def rouge_l(output: str, reference: str) -> float:
    """Rouge-L F of a summary, as the package of [2] computes it.

    Sentences end at every "."; words are what stands between spaces, case and commas included.
    Every sentence of the reference is aligned (`lcs`) with every one of the output, and the words
    of all alignments are put together (the union LCS of [2]). Unlike [2], the package counts
    distinct words: with u of them aligned of n and m, P = u / n and R = u / m.
    """
    # A sentence of spaces alone is one empty word: "".split(" ") == [""]. As in the package.
    ours, theirs = (
        [" ".join(part.split()).split(" ") for part in text.split(".") if part]
        for text in (output, reference)
    )
    if not ours or not theirs:
        return 0.0
    aligned = {word for x in theirs for y in ours for word in lcs(x, y)}
    P, R = (len(aligned) / len(set().union(*sentences)) for sentences in (ours, theirs))
    return 2 * P * R / (P + R + 1e-8)


def read_answer(output: str, first: bool = False) -> int | None:
    """The last run of digits, LongEval's rule, or the `first`, as an integer; None if there is
    none."""
    runs = re.findall(r"[0-9]+", output)
    return int(runs[0 if first else -1]) if runs else None


def is_correct(output: str, answer: int, first: bool = False) -> bool:
    return read_answer(output, first) == answer


def wilson(right: float, cases: int, z: float = 1.96) -> tuple[float, float]:
    """The 95% interval of a share, by Wilson (1927): right near 0 and 1, where it matters here."""
    p, n = right / cases, cases
    middle = (p + z * z / (2 * n)) / (1 + z * z / n)
    half = z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n)) / (1 + z * z / n)
    return max(0.0, middle - half), min(1.0, middle + half)
