//! Runs a VM of the self-test guest with devices under test.

use std::fs::{File, OpenOptions};
use std::path::Path;
use std::time::{Duration, Instant};

use crate::fixture::Scene;
use crate::objects::built;

/// A port that the guest's check `machine` reads, in bytes and as a whole, and writes, expecting nobody there.
pub const PORT: &str = "port = 0x1e5";

/// Runs no longer than any of these VMs takes on a slow machine.
const LIMIT: Duration = Duration::from_secs(60);

/// How a VM ended.
#[derive(Debug)]
pub struct Ended {
    pub code: Option<i32>,
    pub log: String,
    /// What the guest said on its serial port.
    pub console: String,
}

/// A scene with the plugins of a serial port, `plugins` and a link to each of the crates `crates`.
pub fn scene(crates: &[&str]) -> Scene {
    let scene = Scene::new();
    std::fs::create_dir(scene.path("plugins")).unwrap();
    for name in ["vmm-plugin-uart", "vmm-plugin-console"]
        .iter()
        .chain(crates)
    {
        link(&scene, &built(name));
    }
    scene
}

/// Puts a plugin into the scene's directory `plugins`.
pub fn link(scene: &Scene, plugin: &Path) {
    let name = plugin.file_name().unwrap().to_str().unwrap();
    let link = scene.path(&format!("plugins/{name}"));
    std::os::unix::fs::symlink(plugin, link).unwrap();
}

/// Whether VMs can run here; if not, says so for `test`.
pub fn possible(test: &str) -> bool {
    match OpenOptions::new().read(true).write(true).open("/dev/kvm") {
        Ok(_) => true,
        Err(error) => {
            println!("SKIPPED: {test}: /dev/kvm: {error}");
            false
        }
    }
}

/// Runs a guest that is asked for `cmdline`, in a VM with `tables` besides its serial port. A reset ends it with code 7.
pub fn run(scene: &Scene, cmdline: &str, tables: &str) -> Ended {
    run_with(scene, "exit_on_reboot = 7", cmdline, tables)
}

/// The same, with `main` in its table `[main]`.
pub fn run_with(scene: &Scene, main: &str, cmdline: &str, tables: &str) -> Ended {
    let text = format!(
        "[main]\nname = \"t\"\ncpus = 1\nmemory = 64\nkernel = \"builtin:selftest\"\ncmdline = \"{cmdline}\"\n\
         exit_on_halt = 0\n{main}\nprofile = \"none\"\n\
         [dev.com1]\ndriver = \"lpc-uart\"\nport = \"com1\"\nchar_dev = \"tty\"\n\
         [char_dev.tty]\ntype = \"file\"\npath = \"console\"\n{tables}\n"
    );
    scene.write("vm.toml", text);
    let log = File::create(scene.path("log")).unwrap();
    let mut child = scene
        .host()
        .args(["vm.toml", "--plugin-path", "plugins"])
        .stderr(log)
        .spawn()
        .unwrap();
    let start = Instant::now();
    let status = loop {
        if let Some(status) = child.try_wait().unwrap() {
            break status;
        }
        if start.elapsed() > LIMIT {
            child.kill().unwrap();
            panic!("the VM does not end: {}", read(scene, "log"));
        }
        std::thread::sleep(Duration::from_millis(5));
    };
    Ended {
        code: status.code(),
        log: read(scene, "log"),
        console: read(scene, "console"),
    }
}

fn read(scene: &Scene, name: &str) -> String {
    String::from_utf8_lossy(&std::fs::read(scene.path(name)).unwrap_or_default()).into_owned()
}
