"""MixConv made fast: one operation with several forms, and models rewritten to use it.

Part II of the book, chapters 11 to 17, one module or two a chapter. Nothing in `mixconv` outside
this folder imports it, except the package's front door.
"""

from mixconv.fast import rules as rules  # PyTorch learns of the operation with the first import
