"""THC on ABIDE I: control or autism from the graph of the strongest fifth of all edges among AAL's 116 regions."""

from training.brain_networks import BrainNetworks
from training.optimizers import OptimizerConfig
from training.recipe import Facts, Recipe

RECIPE = Recipe(
    name="thc-aal116-abide",
    model="thc-aal116",
    problem=BrainNetworks(
        dataset="abide-diagnosis",
        labels=("control", "autism"),
        atlas="AAL-116",
        matrix="binary_graph",
        edge_density=0.2,
    ),
    epochs=5,
    batch_size=32,
    optimizer=OptimizerConfig(
        muon_lr=1e-2, adamw_lr=1e-4, adamw_betas=(0.9, 0.99), adamw_weight_decay=0.05, warmup_share=0.1
    ),
    facts=Facts(
        version="2.1.0",
        is_default=True,
        description=(
            "THC (Dai et al. 2023) in a small variant of ours, trained from scratch on ABIDE I: a graph of 116 brain "
            "regions gets a class, control or autism, and two levels of communities. For research only, non-commercial."
        ),
        limits=(
            "For research use only; nothing here supports medical decisions. It tells the classes apart only a little "
            "better than chance, and the figures on test_dev, 146 subjects, are uncertain by about 0.05. Trained on "
            "20 sites, on preprocessing, atlas and graph density of one source: expect less elsewhere. Communities "
            "gather regions that are connected with each other in this subject, in part across what anatomy calls a "
            "network; most of the answer comes from the linear path beside them, so that they do not explain it."
        ),
        license="CC BY-NC-SA 4.0, NON-COMMERCIAL: weights that were made of ABIDE I, see the licence of the data",
        data=(
            "ABIDE I (Di Martino et al., Mol Psychiatry 2014) as binary graphs on AAL-116, density 0.20 (Lanciano, "
            "Bonchi, Gionis, KDD 2020; github.com/tlancian/contrast-subgraph @ e34d72a), 729 subjects of 20 sites. "
            "test_dev is fold 0 of five, 146 subjects that were never trained on; valid is every tenth of the others, "
            "the rest is trained on. Settings were chosen on folds 1 to 4, without fold 0; its figures were known, "
            "though, when the kind of the encoder was chosen"
        ),
        data_license=(
            "ABIDE I: unrestricted for NON-COMMERCIAL research use (policy of the International Neuroimaging "
            "Data-sharing Initiative); the graphs' source: free for research, academic and non-profit purposes only"
        ),
        max_body_bytes=20_000_000,
        max_batch=32,
    ),
    gradient_clip=1.0,
    ema_decay=0.9,
    has_bf16=False,
)
