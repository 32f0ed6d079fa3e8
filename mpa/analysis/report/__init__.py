"""The HTML report of runs: `content` reads result files, `figures` draws, `thumbnails` shrinks, `texts` cuts
and redacts, `page` writes.
"""
