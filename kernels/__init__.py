"""Operations on packed tokens: public functions, their autograd, and which implementation serves a call.

One file an operation; `reference` holds the plain PyTorch twin of each, `dispatch` the table of implementations.
Nothing here knows BERT or tasks. The folder is installed as `mtbert.kernels` and refuses any other name, because a
second copy would register its operators twice and would hold a second dispatch state.
"""

from __future__ import annotations

if __name__ != "mtbert.kernels":
    # A program that runs in the checkout's top folder finds this folder under the name of another project's package,
    # for which transformers looks. Version 0 tells it that this one is too old to be used; whoever wants something
    # from here gets the reason.
    __version__ = "0"
    __path__ = []

    def __getattr__(name: str) -> object:
        raise ImportError(
            f"{name}: this package is mtbert.kernels and was imported as {__name__!r}: install the project with "
            "`pip install -e .` and write `import mtbert.kernels`"
        )

else:
    from .add_layer_norm import add_layer_norm
    from .attention import attention
    from .bias_gelu import bias_gelu
    from .dropout import Dropout, dropout
    from .embedding import embedding
    from .first_token_attention import first_token_attention
    from .head_linear import head_linear
    from .linear import linear
    from .lora_linear import lora_linear, lora_qkv
    from .segments import Segments
    from .softmax import softmax

    __all__ = [
        "Dropout",
        "Segments",
        "add_layer_norm",
        "attention",
        "bias_gelu",
        "dropout",
        "embedding",
        "first_token_attention",
        "head_linear",
        "linear",
        "lora_linear",
        "lora_qkv",
        "softmax",
    ]
