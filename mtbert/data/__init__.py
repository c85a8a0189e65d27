"""Reading, tokenising, batching and packing of examples; knows no model and no task."""
