"""How answers are scored, as the benchmarks' own code does, and how sure a share of right ones is.

Sources:
    [1] Rajpurkar et al., "SQuAD", 2016: token F1
    [2] Lin, "ROUGE", 2004, section 3.2: Rouge-L of summaries; and the PyPI package rouge 1.0.1
"""

import math
import re
import string
from collections import Counter
from itertools import chain


def normalize(text: str) -> list[str]:
    """The words that count in [1]: lowercase, without ASCII punctuation, without a, an, the."""
    text = text.lower().translate(str.maketrans("", "", string.punctuation))
    return re.sub(r"\b(a|an|the)\b", " ", text).split()


def f1(output: str, answer: str) -> float:
    """Token F1 [1], 2 P R / (P + R): with c words in common of n and m, P = c / n and R = c / m."""
    ours = normalize(output)
    theirs = normalize(answer)
    common = Counter(ours) & Counter(theirs)
    return 2 * common.total() / max(1, len(ours) + len(theirs))


def lcs(x: list[str], y: list[str]) -> list[str]:
    """A longest common subsequence of x and y; of several, the one that `rouge` finds."""
    above = [[]] * (len(y) + 1)  # of the words of x so far and y[:j], for each j
    for word in x:
        row = [[]]
        for j, other in enumerate(y):
            if word == other:
                row.append([*above[j], word])
            else:
                row.append(max(row[j], above[j + 1], key=len))  # equally long: the first
        above = row
    return above[-1]


def sentences(text: str) -> list[list[str]]:
    """The words of each sentence; of spaces alone they are one empty word, as in the package."""
    return [" ".join(part.split()).split(" ") for part in text.split(".") if part]


def rouge_l(output: str, reference: str) -> float:
    """Rouge-L F of a summary, as the package of [2] computes it.

    Every sentence of the reference is aligned (`lcs`) with every one of the output, and the words
    of all alignments are put together (the union LCS of [2]). Unlike [2], the package counts
    distinct words: with u of them aligned of n and m, P = u / n and R = u / m.
    """
    ours = sentences(output)
    theirs = sentences(reference)
    if not ours or not theirs:
        return 0.0
    aligned = set()
    for x in theirs:
        for y in ours:
            aligned.update(lcs(x, y))
    P = len(aligned) / len(set(chain.from_iterable(ours)))
    R = len(aligned) / len(set(chain.from_iterable(theirs)))
    return 2 * P * R / (P + R + 1e-8)


def is_correct(output: str, answer: int, first: bool = False) -> bool:
    """Whether the last run of digits is the answer, LongEval's rule, or the `first` one is."""
    numbers = re.findall(r"[0-9]+", output)
    if first:
        numbers = numbers[:1]
    return bool(numbers) and int(numbers[-1]) == answer


def wilson(right: float, cases: int) -> tuple[float, float]:
    """The 95% interval of a share, by Wilson (1927): right near 0 and 1, where it matters here."""
    z = 1.96  # standard deviations on either side
    share = right / cases
    scale = 1 + z * z / cases
    middle = (share + z * z / (2 * cases)) / scale
    half = z * math.sqrt(share * (1 - share) / cases + z * z / (4 * cases * cases)) / scale
    return max(0.0, middle - half), min(1.0, middle + half)
