"""`ui`: a page on one's own machine, and the same functions under `/api/` for programs.

Read `server.py` (start and stop), `guard.py` (who may ask), `api.py` (what can be asked), then what answers:
`library.py` (the files), `measuring.py` (one adapter at any size), `jobs.py` (work in the background), `outputs.py`
(what is written, and undone), `drawing.py` (pictures). The page is in `static/`: plain HTML, CSS and JavaScript.
"""
