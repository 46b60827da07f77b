"""Train with each ZeRO stage, in two precisions and with offload; print losses and bytes kept."""

import json

from sftlib.scale.measure import tracked_zero_bytes

from common import start, train


def run(case, steps, stage, **settings):
    engine = start(stage, **settings)
    kept = []

    def look(step):
        if step == 1:  # Adam's moments are there since step 0
            kept.append(vars(tracked_zero_bytes(engine)))

    losses = list(train(engine, range(steps), look))
    most = {kind: max(row[kind] for row in kept) for kind in kept[0]}
    print(json.dumps({"case": case, "losses": losses, "kept": most}))
    engine.destroy()


cpu = {"device": "cpu"}
for stage in range(4):
    run(f"{stage} float32", 20, stage)
for stage in range(4):
    run(f"{stage} bfloat16", 2, stage, dtype="bfloat16")
run("2 offload", 8, 2, offload_optimizer=cpu)
run("3 offload", 8, 3, offload_optimizer=cpu, offload_param=cpu)
