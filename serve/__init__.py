"""The text-generation server: HTTP in front of one decoding engine.

Read it in this order: `app` (routes and middleware), one of `api` (an interface), `prepare` (from parameters
to rows and a plan), `worker` (the thread that owns the model), `queue` (who is next).
"""
