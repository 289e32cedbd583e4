"""Verification of an output folder: against its manifest, its source, another model, and by running it.

Each check streams through files in small steps, so that its memory is bounded whatever the model.
A problem is a line that says what differs; the caller decides that any problem is a failure.
"""
