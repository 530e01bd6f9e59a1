"""Exported models without torch: generation and classification on ONNX Runtime.

>>> model = load("outputs/onnx", threads=2)
>>> model.generate(["Summarize: ..."], max_new_tokens=40)[0].text
"""

from yunque.runtime.batch import Batch, Step
from yunque.runtime.models import Answer, CausalModel, Classifier, Seq2SeqModel, load
from yunque.runtime.options import GenerationOptions

__all__ = ["Answer", "Batch", "CausalModel", "Classifier", "GenerationOptions", "Seq2SeqModel", "Step", "load"]
