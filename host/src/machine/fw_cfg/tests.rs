use super::*;

const REQUEST: u64 = 0x1000;
const TARGET: u64 = 0x2000;
const RAM: u64 = 16 << 20;

fn device() -> FwCfg {
    let mut items = Items::new(3, [7; 16]);
    items.file("opt/b", *b"second").unwrap();
    items.file("etc/a", *b"first").unwrap();
    items.made("etc/made", Box::new(|| vec![9; 5])).unwrap();
    FwCfg::new(items, Arc::new(GuestMemory::new(RAM).unwrap()))
}

fn bytes(device: &FwCfg, key: u16, count: usize) -> Vec<u8> {
    device.write(0, 0, 2, key.into());
    (0..count).map(|_| device.read(0, 1, 1) as u8).collect()
}

/// The directory as firmware reads it: name to key and size.
fn directory(device: &FwCfg) -> Vec<(String, u16, u32)> {
    let count = u32::from_be_bytes(bytes(device, 0x19, 4).try_into().unwrap());
    let all = bytes(device, 0x19, 4 + 64 * count as usize);
    let entry = |entry: &[u8]| {
        let name = entry[8..].split(|byte| *byte == 0).next().unwrap();
        (
            String::from_utf8(name.to_vec()).unwrap(),
            u16::from_be_bytes([entry[4], entry[5]]),
            u32::from_be_bytes(entry[..4].try_into().unwrap()),
        )
    };
    all[4..].chunks(64).map(entry).collect()
}

fn dma(device: &FwCfg, control: u32, len: u32, target: u64) -> u32 {
    let mut request = control.to_be_bytes().to_vec();
    request.extend(len.to_be_bytes());
    request.extend(target.to_be_bytes());
    device.memory.write(REQUEST, &request).unwrap();
    device.write(0, 4, 4, 0);
    device.write(0, 8, 4, u64::from((REQUEST as u32).swap_bytes()));
    let mut result = [0; 4];
    device.memory.read(REQUEST, &mut result).unwrap();
    u32::from_be_bytes(result)
}

#[test]
fn ports_give_items_byte_by_byte() {
    let device = device();
    assert_eq!(bytes(&device, 0, 6), b"QEMU\0\0");
    assert_eq!(bytes(&device, 1, 4), [3, 0, 0, 0]);
    assert_eq!(bytes(&device, 2, 16), [7; 16]);
    assert_eq!(bytes(&device, 5, 4), [3, 0, 0, 0]);
    assert_eq!(bytes(&device, 0x3000, 2), [0, 0], "no such item");
    let files = directory(&device);
    assert_eq!(
        files.iter().map(|file| file.0.as_str()).collect::<Vec<_>>(),
        ["etc/a", "etc/made", "opt/b"]
    );
    assert_eq!(bytes(&device, files[0].1, 5), b"first");
    assert_eq!(files[1].2, 5);
    assert_eq!(bytes(&device, files[2].1, 8), b"second\0\0");
    device.reset();
    assert_eq!(device.read(0, 1, 1), u64::from(b'Q'));
}

#[test]
fn dma_copies_selects_and_skips() {
    let device = device();
    // "QEMU CFG", big endian in memory: as two dwords read by a little-endian CPU.
    assert_eq!(
        device.read(0, 4, 4),
        u64::from(u32::from_le_bytes(*b"QEMU"))
    );
    assert_eq!(
        device.read(0, 8, 4),
        u64::from(u32::from_le_bytes(*b" CFG"))
    );
    let key = u32::from(directory(&device)[2].1) << 16;
    assert_eq!(dma(&device, key | DMA_SELECT | DMA_SKIP, 3, 0), 0);
    device.memory.write(TARGET, &[0xaa; 8]).unwrap();
    assert_eq!(dma(&device, DMA_READ, 5, TARGET), 0);
    let mut back = [0; 8];
    device.memory.read(TARGET, &mut back).unwrap();
    assert_eq!(&back, b"ond\0\0\xaa\xaa\xaa");
    // With an 8-byte write as well.
    let request = [
        &(key | DMA_SELECT | DMA_READ).to_be_bytes()[..],
        &6_u32.to_be_bytes(),
        &TARGET.to_be_bytes(),
    ];
    device.memory.write(REQUEST, &request.concat()).unwrap();
    device.write(0, 4, 8, REQUEST.swap_bytes());
    device.memory.read(TARGET, &mut back).unwrap();
    assert_eq!(&back[..6], b"second");
}

#[test]
fn hostile_requests_are_contained() {
    let device = device();
    let key = u32::from(directory(&device)[0].1) << 16 | DMA_SELECT;
    assert_eq!(dma(&device, key | DMA_READ, 16, RAM - 8), DMA_ERROR);
    assert_eq!(
        dma(&device, key | DMA_READ, u32::MAX, u64::MAX - 3),
        DMA_ERROR
    );
    assert_eq!(dma(&device, key | DMA_READ, u32::MAX, TARGET), DMA_ERROR);
    device.memory.write(TARGET, &[0xaa]).unwrap();
    let long = FILE_MAX as u32 + 1;
    assert_eq!(dma(&device, key | DMA_READ, long, TARGET), DMA_ERROR);
    let mut back = [0];
    device.memory.read(TARGET, &mut back).unwrap();
    assert_eq!(back, [0xaa], "refused before anything is copied");
    assert_eq!(dma(&device, key | DMA_WRITE, 1, TARGET), DMA_ERROR);
    assert_eq!(
        dma(&device, key | DMA_READ, 4, REQUEST - 2),
        0,
        "over itself"
    );
    assert_eq!(dma(&device, DMA_SKIP, u32::MAX, 0), 0);
    assert_eq!(dma(&device, DMA_READ, 1, TARGET), 0);
    // The request itself is nowhere, or partly.
    for address in [u64::MAX, RAM, RAM - 4, 0xfee0_0000] {
        device.write(0, 4, 8, address.swap_bytes());
    }
    let mut seed = 1_u64;
    for _ in 0..20_000 {
        seed = seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
        let (offset, width) = (seed >> 20 & 15, 1 << (seed >> 60 & 3));
        if seed >> 40 & 1 == 0 {
            device.write(0, offset, width, seed >> 32);
        } else {
            device.read(0, offset, width);
        }
    }
}

#[test]
fn names_are_checked() {
    let mut items = Items::new(1, [0; 16]);
    for name in ["", "a b", "ü", &"x".repeat(56), "tab\t"] {
        assert!(items.file(name, *b"").is_err(), "{name}");
    }
    items.file(&"x".repeat(55), *b"").unwrap();
    let error = items.file(&"x".repeat(55), *b"").unwrap_err().to_string();
    assert!(error.contains("two fw_cfg files"), "{error}");
}
