//! VM files laid over each other: what comes of them, and reports that name the file in which something is wrong.

#![allow(clippy::unwrap_used, clippy::expect_used, missing_docs)]

mod fixture;
mod run;

use std::path::Path;
use vmm_host::hypervisor::Kind;

use fixture::Scene;

const MAIN: &str = "[main]\nname = \"x\"\ncpus = 1\nmemory = 64\nkernel = \"builtin:selftest\"\nprofile = \"none\"\n";
const DISK: &str = "[dev.block0]\ndriver = \"pci-virtio-block\"\npci-path = \"0.4.0\"\nblock_dev = \"root\"\n\
    [block_dev.root]\ntype = \"file\"\npath = \"disk.img\"\ndirect = true\n";

/// Writes the files `0.toml`, `1.toml` and so on.
fn write(scene: &Scene, files: &[&str]) -> Vec<String> {
    let name = |(number, text): (usize, &&str)| {
        let name = format!("{number}.toml");
        scene.write(&name, text);
        name
    };
    files.iter().enumerate().map(name).collect()
}

/// What `vmm-host check` says to these files.
fn check(scene: &Scene, files: &[&str]) -> fixture::Ran {
    let names = write(scene, files);
    let mut arguments = vec!["check", "--plugin-path", "plugins"];
    arguments.extend(names.iter().map(String::as_str));
    scene.run(&arguments)
}

/// The options of the one backend, and the plugin options of the one device, that come of these files.
fn options(scene: &Scene, files: &[&str]) -> (String, String) {
    let names = write(scene, files);
    let paths: Vec<_> = names.iter().map(|name| scene.path(name)).collect();
    let search = vmm_host::plugins::search::SearchOptions {
        flags: vec![scene.path("plugins")],
        ..Default::default()
    };
    let loaded =
        vmm_host::config::load(&paths, &search, Kind::Kvm).unwrap_or_else(|r| panic!("{r}"));
    let text = |options: &[(String, vmm_host::plugins::schema::OptionValue)]| {
        let all: Vec<_> = options.iter().map(|(k, v)| format!("{k}={v}")).collect();
        all.join(" ")
    };
    let (backend, device) = (&loaded.config.backends[0], &loaded.config.devices[0]);
    let backend = format!(
        "{} {}",
        backend.backend.backend().name,
        text(&backend.options)
    );
    (backend, text(&device.options))
}

#[test]
fn a_backend_is_swapped_and_a_key_is_changed() {
    let scene = Scene::with_our_plugins();
    let base = format!("{MAIN}{DISK}");
    let memory = "[block_dev.root]\ntype = \"mem-async\"\nsize = \"8M\"\n";
    let (backend, device) = options(&scene, &[&base, memory]);
    assert!(backend.starts_with("mem-async size=8388608 "), "{backend}");
    assert!(
        !backend.contains("disk.img") && !backend.contains("direct"),
        "{backend}"
    );
    assert!(device.contains("queues=1"), "{device}");

    let other = "[block_dev.root]\npath = \"other.img\"\n[dev.block0]\nqueues = 4\n";
    let (backend, device) = options(&scene, &[&base, other]);
    assert!(
        backend.contains("path=\"other.img\"") && backend.contains("direct=true"),
        "{backend}"
    );
    assert!(device.contains("queues=4"), "{device}");

    // The third lies over what the second has made of the first.
    let larger = "[block_dev.root]\nsize = \"9M\"\n";
    let (backend, _) = options(&scene, &[&base, memory, larger]);
    assert!(backend.starts_with("mem-async size=9437184 "), "{backend}");
}

#[test]
fn main_may_be_split_between_files() {
    let scene = Scene::with_our_plugins();
    let ran = check(
        &scene,
        &[
            "[main]\nname = \"split\"\ncpus = 1\nmemory = 64\nprofile = \"none\"\n",
            "[main]\nmemory = 96\nkernel = \"builtin:selftest\"\n",
        ],
    );
    assert_eq!((ran.code, ran.stderr.as_str()), (Some(0), ""));
    let expected =
        "0.toml + 1.toml: good: VM split, vCPUs 1, memory 96 MiB, devices 0, backends 0\n";
    assert_eq!(ran.stdout, expected);
}

#[test]
fn what_lies_below_can_be_removed_the_profiles_part_as_well() {
    let scene = Scene::with_our_plugins();
    let base = MAIN.replace("none", "minimal");
    let plain = check(&scene, &[&base]);
    assert!(plain.stdout.contains("devices 1, backends 1"), "{plain:?}");
    let ran = check(&scene, &[&base, "remove = [\"dev\", \"char_dev\"]\n"]);
    assert_eq!((ran.code, ran.stderr.as_str()), (Some(0), ""));
    assert!(ran.stdout.contains("devices 0, backends 0"), "{ran:?}");
    // One of two keys that exclude each other goes, so that the other can come.
    let seed = "[dev.s]\ndriver = \"pci-virtio-block\"\npci-path = \"0.5.0\"\nblock_dev = \"s\"\n[block_dev.s]\ntype = \"cloudinit\"\n[cloudinit]\nuser-data = \"x\"\n";
    scene.write("data", "y");
    let site = "[cloudinit]\nuser-data-path = \"data\"\n";
    let both = check(&scene, &[&format!("{MAIN}{seed}"), site]);
    assert!(
        both.stderr
            .contains("1.toml:2:1: error: [cloudinit] has both `user-data-path` and `user-data`"),
        "{both:?}"
    );
    let one = check(
        &scene,
        &[
            &format!("{MAIN}{seed}"),
            &format!("remove = [\"cloudinit.user-data\"]\n{site}"),
        ],
    );
    assert_eq!((one.code, one.stderr.as_str()), (Some(0), ""));
}

#[test]
fn reports_name_the_file() {
    let scene = Scene::with_our_plugins();
    let base = format!("{MAIN}{DISK}");
    for (site, expected) in [
        (
            "[dev.blokc0]\nqueues = 2\n",
            &[
                "1.toml:1:6: error: [dev.blokc0] lacks the key `driver`\n",
                "did you mean [dev.block0]?\n",
                "0.toml + 1.toml: 1 error\n",
            ][..],
        ),
        (
            "[block_dev.boot]\npath = \"x\"\n",
            &[
                "1.toml:1:12: error: [block_dev.boot] lacks the key `type`\n",
                "did you mean [block_dev.root]?\n",
            ],
        ),
        (
            "[dev.block0]\nqueus = 2\nqueue_size = \"big\"\n",
            &[
                "1.toml:2:1: error: [dev.block0] has no key `queus`\n",
                "1.toml:3:14: error: `queue_size` in [dev.block0]",
            ],
        ),
        (
            "[block_dev.root]\ntype = \"mem-async\"\n",
            &["1.toml:1:12: error: [block_dev.root] lacks the key `size`\n"],
        ),
        (
            "[block_dev.root]\npath = \n[dev.block0]\nqueues = 99\n",
            &[
                "1.toml:2:",
                "TOML syntax",
                "1.toml:4:10: error: `queues` in [dev.block0]",
            ],
        ),
        (
            "remove = [\"dev.block1\"]\n",
            &[
                "1.toml:1:11: error: `remove`: [dev] has no \"block1\"\n",
                "did you mean `block0`?\n",
            ],
        ),
        (
            "remov = [\"dev.block0\"]\n",
            &[
                "1.toml:1:1: error: there is no table or key `remov`\n",
                "did you mean `remove`?\n",
            ],
        ),
        (
            "[dev.c]\ndriver = \"pci-virtio-block\"\npci-path = \"0.4.0\"\nblock_dev = \"root\"\n",
            &[
                "1.toml:3:12: error: `pci-path` in [dev.c]: 0.4.0 is taken by [dev.block0]\n",
                "there: 0.toml:9\n",
            ],
        ),
    ] {
        let ran = check(&scene, &[&base, site]);
        assert_eq!(ran.code, Some(3), "{site}: {ran:?}");
        for expected in expected {
            assert!(
                ran.stderr.contains(expected),
                "{site}: {expected}:\n{}",
                ran.stderr
            );
        }
        assert!(!ran.stderr.contains("0.toml:1:"), "{site}:\n{}", ran.stderr);
    }
    // A mistake of the first file that the second does not touch is still the first one's; both are in one report.
    let ran = check(
        &scene,
        &[&format!("{base}colour = 1\n"), "[main]\nshape = 2\n"],
    );
    for expected in [
        "0.toml:15:1: error: [block_dev.root] has no key `colour`\n",
        "1.toml:2:1: error: [main] has no key `shape`\n",
        "0.toml + 1.toml: 2 errors\n",
    ] {
        assert!(ran.stderr.contains(expected), "{}", ran.stderr);
    }
}

#[test]
fn a_driver_that_nobody_provides_is_one_problem_of_all_files() {
    let scene = Scene::with_our_plugins();
    let device = |name: &str, address: u8| {
        format!("[dev.{name}]\ndriver = \"pci-teapot\"\npci-path = \"0.{address}.0\"\n")
    };
    let base = format!("{MAIN}{}{}", device("a", 4), device("b", 5));
    let ran = check(&scene, &[&base, &device("c", 6)]);
    assert!(
        ran.stderr.contains("0.toml:8:10: error: "),
        "{}",
        ran.stderr
    );
    assert!(
        ran.stderr.contains("likewise in line 11, 1.toml:2\n"),
        "{}",
        ran.stderr
    );
}

#[test]
fn files_that_cannot_be_read_are_all_named() {
    let scene = Scene::with_our_plugins();
    scene.write("base.toml", MAIN);
    let ran = scene.run(&["check", "base.toml", "site.toml", "there.toml"]);
    assert_eq!(ran.code, Some(3));
    for name in ["site.toml", "there.toml"] {
        assert!(
            ran.stderr
                .contains(&format!("error: {name}: No such file or directory")),
            "{}",
            ran.stderr
        );
    }
    assert!(!ran.stderr.contains("base.toml"), "{}", ran.stderr);
}

/// `[plugins] path` is relative to the file that it stands in.
#[test]
fn plugins_are_looked_for_beside_the_file_that_says_so() {
    let scene = Scene::new();
    let manifest = "abi = \"1.0\"\nname = \"p\"\nversion = \"0\"\n[[driver]]\nname = \"beside\"\nbus = \"isa\"\n";
    scene.write("site/mine/libp.so", fixture::plugin(manifest));
    scene.write(
        "base.toml",
        format!("{MAIN}[plugins]\npath = \"nowhere\"\n"),
    );
    scene.write(
        "site/site.toml",
        "[plugins]\npath = \"mine\"\n[dev.a]\ndriver = \"beside\"\n",
    );
    let ran = scene.run(&["check", "base.toml", "site/site.toml"]);
    assert_eq!((ran.code, ran.stderr.as_str()), (Some(0), ""));
}

/// The example of `docs/vm-file.md`.
#[test]
fn the_documented_site_is_accepted() {
    let page = Path::new(env!("CARGO_MANIFEST_DIR")).join("../docs/vm-file.md");
    let page = std::fs::read_to_string(page).unwrap();
    let (_, site) = page.split_once("```toml\n# site.toml:").unwrap();
    let (site, _) = site.split_once("```").unwrap();
    let scene = Scene::with_our_plugins();
    scene.write("disk.img", "");
    scene.write("user-data.yaml", "#cloud-config\n");
    let seed = "[dev.seed]\ndriver = \"pci-virtio-block\"\npci-path = \"0.5.0\"\nblock_dev = \"seed\"\n\
        [block_dev.seed]\ntype = \"cloudinit\"\n[cloudinit]\nuser-data = \"x\"\n";
    let base = format!("{}{DISK}{seed}", MAIN.replace("none", "propolis"));
    let ran = check(&scene, &[&base, &format!("#{site}")]);
    assert_eq!((ran.code, ran.stderr.as_str()), (Some(0), ""));
    assert!(ran.stdout.contains("devices 4, backends 3"), "{ran:?}");
}

/// The shipped pair, run: the guest finds its disk in the file, which has its mark afterwards.
#[test]
fn the_self_test_passes_on_the_disk_of_a_site() {
    if !run::kvm("the_self_test_passes_on_the_disk_of_a_site") {
        return;
    }
    let configs = Path::new(env!("CARGO_MANIFEST_DIR")).join("../configs");
    let site = std::fs::read_to_string(configs.join("sites/disk-in-file.toml")).unwrap();
    let base = configs.join("hello.toml");
    let scene = run::Scene::new();
    scene.image("disk.img", 16 << 20);
    let ran = scene
        .start_with(run::host(), &site, &[base.to_str().unwrap()])
        .wait()
        .exited(0)
        .said("PASS")
        .said("site-1");
    assert!(!ran.out.contains("FAIL"), "{ran}");
    let image = std::fs::read(scene.path("disk.img")).unwrap();
    assert!(image.iter().any(|&byte| byte != 0), "the guest's mark");
}
