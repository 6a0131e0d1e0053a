"""MixConv made fast: one operation with several forms, and models rewritten to use it.

Part II of the book, chapters 11 to 17, one module or two a chapter. Nothing in `mixconv` outside
this folder imports it, except the package's front door.
"""

from mixconv.fast import block_kernel as block_kernel  # forms and rules: known with the import
from mixconv.fast import gpu as gpu
from mixconv.fast import kernel as kernel
from mixconv.fast import rules as rules
