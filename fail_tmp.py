import sys, asyncio, argparse, shutil, time
from contextlib import ExitStack
from loadtest import failures as f
o = argparse.Namespace(runs=int(sys.argv[2]), streams=4, last_s=4.0, patience=60.0, failures=sys.argv[1], seed=int(sys.argv[3]) if len(sys.argv)>3 else 1)
with ExitStack() as running:
    t=time.time(); bed=f.Bed(running); print("bed", time.time()-t, flush=True)
    try:
        runs, troubles = asyncio.run(f.inject(bed, o))
        f.report(runs, troubles, o)
    finally:
        for n,s in (("front",bed.front),("whole",bed.whole),("p0",bed.prefill[0]),("p1",bed.prefill[1]),("d",bed.decode)):
            shutil.copy(s.log_path, f"/tmp/{n}.log")
