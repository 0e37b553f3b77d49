"""`python -m engine.bench`: what this machine and this build reach. Nothing here is a test, and no test runs it.

figures.py is one number with its settings; machine.py the machine's limits; workloads.py and own_side.py what is run and how;
peer.py and llama_cpp_side.py the same work on llama.cpp; own_cost.py what the engine itself costs; serving.py and session.py
what a client sees; synthetic.py models without weights. __main__.py reads the flags and prints.
"""
