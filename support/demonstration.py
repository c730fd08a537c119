"""The demonstration of `python infer.py`: a LongEval case for the embedded teaching model."""

from pathlib import Path

# The embedded model, for retrieval only.
TEACHER = Path(__file__).resolve().parent.parent / "weights" / "teacher"
FACTORS = TEACHER / "cskv-80.safetensors"
ENGLISH = (
    "The embedded model only finds numbers in its prompt, as `python infer.py` shows. For "
    "English:\npython weights/get_smollm2.py, then --model weights/SmolLM2-135M-Instruct"
)


def shorten(text: str) -> str:
    """What matters of a LongEval case: how it begins, the line that is asked for, the question."""
    first, *lines, last = text.strip().splitlines()
    key = last.split(" in line ")[1].split("?")[0]
    asked = next(line for line in lines if line.startswith(f"line {key}:"))
    return f"{first[:76]} [...]\n[...]\n{asked}\n[...]\n{last}\n"


def read_case() -> str:
    """The prompt of the demonstration."""
    return (TEACHER / "prompt.txt").read_text(encoding="utf-8")
