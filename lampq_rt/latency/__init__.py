"""What a plan's ops cost in time on one machine: recording them, timing them, keeping the table, and predicting.

calls     which ops a model runs under a plan, read from a forward pass that computes nothing
timing    the time of one such call on this machine
table     the JSON file that keeps them, by machine
profile   fills a table with what a model needs (`lampq profile`)
predict   a plan's latency, and its share by site and by pair of neighbours, for the calibrator's budgets
"""
