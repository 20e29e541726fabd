"""The page on which tokens are dragged over a picture: `timm-spot play`.

`stage.py` answers what the page asks, `search.py` step by step, `server.py` hands both to a browser (extra `play`); the
page itself lies in `page/`, without a build step.
"""
