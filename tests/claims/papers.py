def listing(): return ""
