"""Hallucination metrics: what a caption or an answer claims against what is there. No torch; every result a flat dict of fractions."""
