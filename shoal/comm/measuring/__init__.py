"""Measuring collectives: which cases, what each rank does for them, and the figures that come of it.

`cases` and `figures` are plain arithmetic and go without torch; `operations`, `gate` and `rank` are what each process
does; `sweep` starts the processes, or joins those that are there, and puts their numbers together.
"""
