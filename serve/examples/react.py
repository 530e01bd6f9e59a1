"""A ReAct loop over a served model: it thinks, asks a tool, reads what the tool says, and answers.

    python serve/examples/react.py --base_url http://127.0.0.1:8000/v1 --model onnx "How old is the bridge in 2030?"

Yao et al., 2022 (arXiv:2210.03629), with LangChain's ChatOpenAI. The tools are a calculator and three notes; put your
own retriever in place of `look_up`. The model must be large enough to keep to the form.
"""

from __future__ import annotations

import argparse
import ast
import operator
import os
import re
import sys
from collections.abc import Callable

from langchain_openai import ChatOpenAI

NOTES = {
    "bridge": "The stone bridge was opened in 1874.",
    "mill": "The water mill grinds 40 sacks of flour a day.",
    "library": "The library lends 12 books to a reader at a time.",
}

PROMPT = """Answer the question. Use these forms, one line each:
Thought: what you think
Action: calculate[an arithmetic expression] or look_up[one word]
Observation: what the action gave (it is written for you)
Final answer: the answer

Question: {question}
"""

ACTION = re.compile(r"Action:\s*(\w+)\[(.*)\]")
ANSWER = re.compile(r"Final answer:\s*(.+)")
OPERATORS: dict[type, Callable[..., float]] = {
    ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Div: operator.truediv,
    ast.USub: operator.neg,
}  # fmt: skip


def calculate(expression: str) -> str:
    """The value of an expression of numbers and + - * /; nothing else is evaluated."""

    def value(node: ast.AST) -> float:
        match node:
            case ast.Expression(body):
                return value(body)
            case ast.Constant(int() | float() as number):
                return number
            case ast.BinOp(left, operation, right) if type(operation) in OPERATORS:
                return OPERATORS[type(operation)](value(left), value(right))
            case ast.UnaryOp(operation, operand) if type(operation) in OPERATORS:
                return OPERATORS[type(operation)](value(operand))
        raise ValueError(f"only numbers and + - * /, not {ast.unparse(node)}")

    try:
        return f"{value(ast.parse(expression.strip(), mode='eval')):g}"
    except (SyntaxError, ValueError, ArithmeticError) as error:
        return f"not possible: {error}"


def look_up(word: str) -> str:
    """The note about a word."""
    return NOTES.get(word.strip().lower(), f"no note about {word!r}; there are: {', '.join(NOTES)}")


TOOLS = {"calculate": calculate, "look_up": look_up}


def answer(model: ChatOpenAI, question: str, max_steps: int) -> str | None:
    """The model's answer, or None when it has given none after ``max_steps`` turns."""
    text = PROMPT.format(question=question)
    for _ in range(max_steps):
        # The model must not write the observation itself.
        said = str(model.invoke(text, stop=["Observation:"]).content).strip()
        print(said)
        text += said + "\n"
        if found := ANSWER.search(said):
            return found[1].strip()
        if found := ACTION.search(said):
            tool = TOOLS.get(found[1])
            observation = tool(found[2]) if tool else f"no such action; there are: {', '.join(TOOLS)}"
        else:
            observation = "write an Action or a Final answer"
        print(f"Observation: {observation}")
        text += f"Observation: {observation}\n"
    return None


def main() -> int:
    """Ask one question; 1 when the model came to no answer."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("question")
    parser.add_argument("--base_url", default="http://127.0.0.1:8000/v1")
    parser.add_argument("--model", required=True, help="a name of /v1/models")
    parser.add_argument("--max_steps", type=int, default=6)
    parser.add_argument("--max_tokens", type=int, default=128)
    args = parser.parse_args()
    model = ChatOpenAI(
        base_url=args.base_url,
        api_key=os.environ.get("YUNQUE_API_KEY", "none"),
        model=args.model,
        temperature=0,
        max_tokens=args.max_tokens,
    )
    found = answer(model, args.question, args.max_steps)
    print(f"\n{found}" if found else "\nno answer")
    return 0 if found else 1


if __name__ == "__main__":
    sys.exit(main())
