"""The Triton implementations: one file an operation, each with its custom operator, its launcher and its kernels.

Imported only when the dispatch table gives a call to Triton, so that an installation without triton imports, and no
program pays for an import that it does not use. The public functions, and with them every contract and check of an
argument, stand one floor up: what arrives here is contiguous, of fitting shapes and of a served dtype.
"""
