"""The live page of a run: one Bokeh document, fed by one reader of the run, however many look at it.

`reader` follows the run and puts what has changed into one message, which every viewer gets; `document` is what is
drawn, `server` serves both, `access` says who may look and who may command, `served` serves it on a port of its own.
"""

from importlib.util import find_spec

if find_spec("bokeh") is None:
    raise ModuleNotFoundError("found no Bokeh, expected it for the live page: pip install 'steering[view]'")
