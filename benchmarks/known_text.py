"""Prints the calibration gate's measure of texts in several languages as a table.

    .venv/bin/python benchmarks/known_text.py CHECKPOINT [--adapter LORA] [--pairs FILE]

Each text is given as plain-text calibration; the ratio is packager/fidelity/language.py's, and above 1 a build would
stop. The texts are short prose written for this table, so the figures only distinguish "known" from "not known".
"""

from __future__ import annotations

import argparse
import hashlib
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from packager.build import Request, open_merged
from packager.core.progress import Silent
from packager.core.store import Store, default_root
from packager.fidelity.samples import make_samples
from packager.fidelity.source import known_calibration
from packager.planning.catalog import load_target
from packager.prompts import calibration
from packager.prompts.calibration import Calibration
from packager.recipe import Job

TEXTS = {
    "English": "The machine is switched off before the cover is opened. Wait two minutes until the capacitors are "
    "empty, hang your tag on the switch, and only then take the cover away. If the lamp is still on, call the office.",
    "Python": "def merge(left, right):\n    result = []\n    while left and right:\n        if left[0] <= right[0]:\n"
    "            result.append(left.pop(0))\n        else:\n            result.append(right.pop(0))\n"
    "    return result + left + right\n",
    "German": "Die Maschine wird vor dem Öffnen der Abdeckung abgeschaltet. Danach wartet man zwei Minuten, bis sich "
    "die Kondensatoren entladen haben, und hängt ein Schild an den Schalter."
    " Erst dann darf die Abdeckung entfernt werden.",
    "Russian": "Москва является столицей России и крупнейшим по численности населения городом страны. Город расположен "
    "на реке Москве в центре Восточно-Европейской равнины. Зимой дни становятся короче, а ночи длиннее.",
    "Arabic": "القاهرة هي عاصمة جمهورية مصر العربية وأكبر مدنها من حيث عدد السكان والمساحة. تقع المدينة على ضفاف نهر "
    "النيل وتعد مركزا ثقافيا وسياسيا مهما.",
    "Chinese": "今年春天，公司决定对生产线进行全面升级。"
    "工程师们首先检查了旧设备的电气系统，发现许多线路已经老化，需要更换。"
    "随后，他们讨论了新的控制方案，并邀请供应商前来演示。"
    "经过两个月的努力，新系统终于投入使用，产量提高了百分之二十。",
    "Japanese": "日本の首都は東京です。"
    "東京は世界で最も人口の多い都市の一つであり、政治、経済、文化の中心地です。"
    "春には桜が咲き、多くの観光客が訪れます。"
    "夏は暑く、秋には山の木々が赤や黄色に色づきます。冬には雪が降る地方もあります。",
    "Korean": "서울은 대한민국의 수도이자 최대 도시이다. "
    "한강을 끼고 있으며 정치, 경제, 문화의 중심지 역할을 하고 있다. "
    "많은 관광객이 해마다 이 도시를 찾는다. 봄에는 벚꽃이 피고 가을에는 단풍이 아름답게 물든다.",
    "Thai": "กรุงเทพมหานครเป็นเมืองหลวงและนครที่มีประชากรมากที่สุดของประเทศไทย เป็นศูนย์กลางการปกครอง การศึกษา "
    "การคมนาคมขนส่ง และการเงินการธนาคารของประเทศ",
    "letters at random": "qz vlkw pr dtnmb xo hhgys  ewja cuf rpl ktt ynzv qom dw bxge laru fis ck jpmv tho zzy wkned "
    "guq arb lxio vts pph mcj ydue okr nfw slq tgz bve xha mij dcl wroyt peun",
}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", help="a checkpoint folder")
    parser.add_argument("--adapter", type=Path, help="a LoRA that is merged into it first")
    parser.add_argument("--pairs", type=Path, help="fine-tuning pairs, measured by their answers")
    options = parser.parse_args()
    store, target = Store(default_root()), load_target("desktop_linux_x86_64")
    request = Request(options.checkpoint, target.name, adapter=options.adapter)
    checkpoint = open_merged(request, store, Silent()).checkpoint
    texts = {
        name: Calibration((), (text,), hashlib.sha256(text.encode()).hexdigest(), name) for name, text in TEXTS.items()
    }
    if options.pairs:
        texts[f"answers of {options.pairs.name}"] = calibration.load(options.pairs)
    print("| text | characters | nats a character | by counting | ratio |\n|---|---|---|---|---|")
    for name, data in texts.items():
        job = Job(checkpoint, target, store, Silent(), calibration=data, trust_calibration=True)
        for known in known_calibration(job, make_samples(job)).values():
            figures = f"{known.loss:.2f} | {known.counted:.2f} | {known.ratio:.2f}"
            print(f"| {name} | {known.characters} | {figures} |", flush=True)


if __name__ == "__main__":
    main()
