"""Seeing inside a model: what it needs, how it was loaded, and what a step of it does.

plan ──► footprint                            headers only, no weight is read
  └────► ModelRunner ──► load                 what became of files and tensors
               └───────► measured steps ──► trace, flowchart
                                              └──► table │ JSON │ HTML
"""
