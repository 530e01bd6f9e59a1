"""A program-aided answer over a served model: it writes a small program, this script computes what it says.

    python serve/examples/pal.py --base_url http://127.0.0.1:8000/v1 --model onnx "3 crates of 12 eggs, 5 break. Left?"

Gao et al., 2022 (arXiv:2211.10435), with OpenAI's client. A model's program is not to be trusted: only assignments of
arithmetic are computed here, nothing is executed. The model must be large enough to write such lines.
"""

from __future__ import annotations

import argparse
import ast
import operator
import os
import sys
from collections.abc import Callable

from openai import OpenAI

PROMPT = """Write lines of arithmetic, each a name = an expression of numbers and names. The last name is answer.

Question: A baker bakes 4 trays of 6 rolls and sells 10. How many rolls are left?
rolls = 4 * 6
answer = rolls - 10

Question: {question}
"""

OPERATORS: dict[type, Callable[..., float]] = {
    ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv, ast.Mod: operator.mod, ast.USub: operator.neg,
}  # fmt: skip


def compute(program: str) -> float:
    """The value of ``answer`` after the program's assignments.

    Raises:
        ValueError: anything but assignments of arithmetic, or no ``answer``.
    """
    names: dict[str, float] = {}

    def value(node: ast.AST) -> float:
        match node:
            case ast.Constant(int() | float() as number):
                return number
            case ast.Name(name) if name in names:
                return names[name]
            case ast.BinOp(left, operation, right) if type(operation) in OPERATORS:
                return OPERATORS[type(operation)](value(left), value(right))
            case ast.UnaryOp(operation, operand) if type(operation) in OPERATORS:
                return OPERATORS[type(operation)](value(operand))
        raise ValueError(f"not arithmetic: {ast.unparse(node)}")

    for line in ast.parse(program).body:
        match line:
            case ast.Assign([ast.Name(name)], expression):
                names[name] = value(expression)
            case _:
                raise ValueError(f"not an assignment: {ast.unparse(line)}")
    if "answer" not in names:
        raise ValueError("the program names no answer")
    return names["answer"]


def answer(client: OpenAI, model: str, question: str, tries: int, max_tokens: int) -> float | None:
    """The computed answer of the first program that computes; None when none of ``tries`` does."""
    for seed in range(tries):
        reply = client.completions.create(
            model=model,
            prompt=PROMPT.format(question=question),
            max_tokens=max_tokens,
            temperature=0 if seed == 0 else 0.7,
            seed=seed,
            stop=["\n\n", "Question:"],
        )
        program = reply.choices[0].text.strip()
        print(program)
        try:
            return compute(program)
        except (SyntaxError, ValueError, ArithmeticError, RecursionError, MemoryError) as error:
            print(f"# not computed: {error}")
    return None


def main() -> int:
    """Ask one question; 1 when no program computed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("question")
    parser.add_argument("--base_url", default="http://127.0.0.1:8000/v1")
    parser.add_argument("--model", required=True, help="a name of /v1/models")
    parser.add_argument("--tries", type=int, default=3)
    parser.add_argument("--max_tokens", type=int, default=128)
    args = parser.parse_args()
    with OpenAI(base_url=args.base_url, api_key=os.environ.get("YUNQUE_API_KEY", "none")) as client:
        found = answer(client, args.model, args.question, args.tries, args.max_tokens)
    print("\nno answer" if found is None else f"\n{found:g}")
    return 1 if found is None else 0


if __name__ == "__main__":
    sys.exit(main())
