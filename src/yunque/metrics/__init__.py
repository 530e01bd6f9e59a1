"""What a text or a classifier is worth, in numbers with intervals; knows nothing of models or trainers."""
