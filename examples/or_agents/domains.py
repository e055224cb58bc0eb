# SPDX-License-Identifier: Apache-2.0
"""Eighteen domains: the nouns that problems are put into words with."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Domain:
  """The nouns of a domain.

  Attributes:
    name: the domain's name, one word.
    actor: who plans, with its article left out.
    products: goods that are made, loaded or packed.
    resources: goods that are used up or needed.
    sites: places that supply.
    clients: places that need.
    workers: who works, or which machine does.
    jobs: tasks for the workers.
  """

  name: str
  actor: str
  products: tuple[str, ...]
  resources: tuple[str, ...]
  sites: tuple[str, ...]
  clients: tuple[str, ...]
  workers: tuple[str, ...]
  jobs: tuple[str, ...]


def _domain(name: str, actor: str, *lists: str) -> Domain:
  return Domain(name, actor, *(tuple(words.split()) for words in lists))


DOMAINS = (
  _domain(
    *('food', 'bakery', 'bread cake pie roll tart', 'flour sugar butter yeast'),
    *('mill depot cellar barn', 'cafe hotel kiosk market school'),
    *('Ann Bob Cleo Dan Eve', 'kneading baking icing packing cleaning'),
  ),
  _domain(
    *('furniture', 'joinery', 'chair table shelf desk bed'),
    *('wood labor varnish steel', 'yard sawmill store annex'),
    *('shop office studio clinic bank', 'Finn Gus Hal Iris Jo'),
    'sawing gluing sanding painting fitting',
  ),
  _domain(
    *('farming', 'farm', 'wheat corn beans oats hops'),
    *('land water seed manure', 'field silo shed stable'),
    *('dairy village brewery town fair', 'Kim Lou Max Nia Otto'),
    'plowing sowing weeding mowing threshing',
  ),
  _domain(
    *('health', 'hospital', 'exam scan test visit scope'),
    *('nurses doctors beds reagents', 'lab pharmacy ward archive'),
    *('surgery nursery trauma hospice dialysis', 'Pam Quin Ray Sue Tim'),
    'rounds triage records surgery transport',
  ),
  _domain(
    *('energy', 'utility', 'coal gas oil solar wind'),
    *('power heat steam reserve', 'plant dam turbine reactor'),
    *('city port harbor suburb factory', 'crane pump valve boiler fan'),
    'startup repair checkup upgrade shutdown',
  ),
  _domain(
    *('textiles', 'tailor', 'shirt coat skirt scarf vest'),
    *('cotton wool silk thread', 'loft weaver spinner dyer'),
    *('boutique theater outlet mall bazaar', 'Una Vic Wes Xena Yves'),
    'cutting sewing ironing dyeing folding',
  ),
  _domain(
    *('metals', 'foundry', 'bolt gear pipe rod plate'),
    *('iron copper zinc carbon', 'mine quarry smelter dock'),
    *('garage shipyard railway arsenal bridge', 'lathe press drill mill saw'),
    'turning milling casting forging coating',
  ),
  _domain(
    *('chemistry', 'refinery', 'paint glue soap resin wax'),
    *('acid base solvent pigment', 'tank vat column basin'),
    *(
      'printer laundry garage carmaker potter',
      'mixer dryer oven filter still',
    ),
    'mixing drying heating sieving cooling',
  ),
  _domain(
    *('software', 'startup', 'app site bot plugin game'),
    *('coding design testing hosting', 'cloud rack hub cellar'),
    *('bank museum library airline court', 'Abe Bea Cy Dot Eli'),
    'login search billing chat backup',
  ),
  _domain(
    *('logistics', 'carrier', 'crate drum sack box bale'),
    *('fuel drivers trucks pallets', 'depot airport terminal warehouse'),
    *('north south east west center', 'van lorry tram barge bike'),
    'mail parcels freight returns meals',
  ),
  _domain(
    *('media', 'publisher', 'novel atlas comic diary poster'),
    *('paper ink editing printing', 'press studio archive bindery'),
    *('kiosk campus gallery club museum', 'Fay Gil Hana Ike Jan'),
    'layout proofs cover index photos',
  ),
  _domain(
    *('education', 'college', 'course seminar tutorial workshop lecture'),
    *('teachers rooms tutors projectors', 'campus annex library gym'),
    *('law music physics history sports', 'Kay Leo Mia Ned Ora'),
    'algebra poetry drama botany logic',
  ),
  _domain(
    *('tourism', 'hotel', 'suite tour cruise dinner picnic'),
    *('guides cooks buses boats', 'lodge marina station resort'),
    *('beach castle temple canyon lake', 'Pat Quentin Rosa Sam Tess'),
    'welcome laundry kitchen bar garden',
  ),
  _domain(
    *('finance', 'fund', 'bond stock loan note lease'),
    *('capital risk staff credit', 'vault branch exchange treasury'),
    *('mortgage pension savings broker insurer', 'Uma Vera Walt Xavier Yan'),
    'audit tax payroll report budget',
  ),
  _domain(
    *('building', 'contractor', 'house garage fence roof patio'),
    *('bricks cement timber labor', 'kiln pit yard quarry'),
    *('tower stadium tunnel plaza pier', 'Zoe Al Bo Cal Deb'),
    'digging framing wiring tiling paving',
  ),
  _domain(
    *('electronics', 'workshop', 'phone radio clock lamp camera'),
    *('chips glass cable plastic', 'cleanroom depot lab store'),
    *(
      'retailer webshop navy observatory hospital',
      'robot printer laser oven arm',
    ),
    'solder etching assembly testing labels',
  ),
  _domain(
    *('fishing', 'fishery', 'cod tuna crab eel squid'),
    *('ice salt nets diesel', 'wharf bay lagoon reef'),
    *('market cannery diner aquarium pub', 'Ed Flo Gwen Hugo Ina'),
    'gutting salting smoking mending sorting',
  ),
  _domain(
    *('relief', 'charity', 'tent blanket ration stove kit'),
    *('donors volunteers vehicles storage', 'hangar port church base'),
    *('camp island valley border delta', 'Jim Kora Liv Moe Nell'),
    'rescue water shelter clinic radio',
  ),
)
# Domains that training rows never have.
HELD_OUT_DOMAINS = ('building', 'electronics', 'fishing', 'relief')
