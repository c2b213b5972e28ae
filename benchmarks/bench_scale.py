TABLES = {}
def plan(given): return {}
