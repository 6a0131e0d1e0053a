"""The tutorial's toolchain: notebooks in, package, pages and figures out."""
