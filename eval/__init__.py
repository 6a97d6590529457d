"""Evaluation: questions, answers of models, judges, measures without a judge, and reports.

`tasks` has the questions; `systems` answer them, and `answers` keeps what they said; `generation` goes from
the first to the last. Then `metrics` measures, `judge` and its three methods (`alpaca`, `mt_bench`, `geval`)
ask another model, and `report` tells.
"""
