def dimensions(*a): pass
def known(): return ()
