"""What is behind the storage devices: image files, throw-away layers, other programs' formats.

:mod:`nonroot.backends.drive` has what a user says of an image, and opens it.
"""
