"""Picture 2 between reading and tokenizing: normalize -> filter -> deduplicate -> decontaminate.

`assemble.build_stages` gives the stages that judge one document at a time, `assemble.corpus_passes` those that
need all of them. Each filter is a plain function of a `TextView` and its thresholds.
"""
