"""What engines that serve have in common: requests, plans, counts, recordings and what is read of them.

No engine is named here. An engine's own room finds its routers, tells a ``session.Session`` of its requests and steps,
and calls ``operator`` behind each router's choice.
"""
