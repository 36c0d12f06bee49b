"""Ray: started or joined, its nodes checked, commands submitted to it.

Not here: what is computed on it; that asks for Ray here and nowhere else.
"""
