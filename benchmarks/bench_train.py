TABLES = {}
SIZES=("cpu","smoke")
def plan(given): return {}
