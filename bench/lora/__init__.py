"""The LoRA linears in CUDA: checks and times on a GPU, and the model that predicts them."""
