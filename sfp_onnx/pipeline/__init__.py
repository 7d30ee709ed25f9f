"""The story: inspect, score, plan, apply, prune. The one place that knows the order of the stages.

`prune` is `plan` and `apply` one after the other, in Python as on the command line, with the same defaults. What a run says while it works
goes to the logger ``sfp_onnx`` (the command line prints it); what came of it is in its result.
"""
