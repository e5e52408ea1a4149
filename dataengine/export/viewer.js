// Viewer of a moving scene of 3D Gaussians. No network, no library.
//
// First what only computes (decode, pose, sort: also run outside a browser by the tests), then drawing, then the page.
// Conventions: OpenCV cameras (x right, y down, z forward), pixel centres at +0.5, metres, quaternions wxyz.
"use strict";

const ROW = 1024; // Gaussians in one row of a texture
const NEAR = 0.01; // metres
const WORKER_FROM = 200000; // from this many Gaussians on, sorting leaves the main thread

// ---------------------------------------------------------------------------------------------- decode and pose

function decodeBase64(text) {
  const binary = atob(text.trim());
  const bytes = new Uint8Array(binary.length);
  for (let i = 0; i < binary.length; i++) bytes[i] = binary.charCodeAt(i);
  return bytes;
}

/** Raw numbers of a channel: `rows` rows from byte `offset` on. */
function rawRows(bytes, channel, rows, offset) {
  const length = rows * channel.width;
  return channel.bits === 16
    ? new Uint16Array(bytes.buffer, bytes.byteOffset + offset, length)
    : new Uint8Array(bytes.buffer, bytes.byteOffset + offset, length);
}

/** Write raw rows into `target` (floats) from row `first` on, as low + raw / max * (high - low). */
function unpackRows(raw, channel, target, first) {
  const { width, low, high, bits } = channel;
  const most = 2 ** bits - 1;
  const step = low.map((value, i) => (high[i] - value) / most);
  let at = first * width;
  for (let i = 0; i < raw.length; i += width) {
    for (let k = 0; k < width; k++) target[at++] = low[k] + raw[i + k] * step[k];
  }
}

/** The scene at frame 0: `now` holds means, scales (metres), quats, colors, opacities and raw harmonics of N Gaussians. */
function decodeScene(manifest, bytes) {
  const { count, still, rigid, loose, bodies, channels } = manifest;
  const now = {};
  for (const [name, channel] of Object.entries(channels)) {
    const raw = rawRows(bytes, channel, count, channel.offset);
    if (name === "harmonics") {
      now.harmonics = new Uint8Array(raw); // the shader maps these to numbers itself
      continue;
    }
    now[name] = new Float32Array(count * channel.width);
    unpackRows(raw, channel, now[name], 0);
  }
  for (let i = 0; i < now.scales.length; i++) now.scales[i] = Math.exp(now.scales[i]);
  const start = {
    means: now.means.slice(3 * still, 3 * (still + rigid)),
    quats: now.quats.slice(4 * still, 4 * (still + rigid)),
  };
  const body = new Uint16Array(bytes.buffer, bytes.byteOffset + manifest.bodyOffset, rigid);
  const poses = new Float32Array(bytes.buffer, bytes.byteOffset + manifest.poseOffset, 7 * bodies * manifest.frames);
  return { manifest, bytes, count, still, rigid, loose, now, start, body, poses };
}

/** Bring what moves to frame t. Rows before `still` never change. */
function poseScene(scene, t) {
  const { manifest, bytes, now, start, still, rigid, loose, count } = scene;
  const { means, quats } = now;
  for (let i = 0; i < rigid; i++) {
    const at = 7 * (t * manifest.bodies + scene.body[i]);
    const [w, x, y, z, px, py, pz] = scene.poses.subarray(at, at + 7);
    const [a, b, c] = start.means.subarray(3 * i, 3 * i + 3);
    // v + 2 w (u x v) + 2 u x (u x v)
    const cx = y * c - z * b, cy = z * a - x * c, cz = x * b - y * a;
    const m = 3 * (still + i);
    means[m] = a + 2 * (w * cx + y * cz - z * cy) + px;
    means[m + 1] = b + 2 * (w * cy + z * cx - x * cz) + py;
    means[m + 2] = c + 2 * (w * cz + x * cy - y * cx) + pz;
    const [qw, qx, qy, qz] = start.quats.subarray(4 * i, 4 * i + 4);
    const q = 4 * (still + i);
    quats[q] = w * qw - x * qx - y * qy - z * qz;
    quats[q + 1] = w * qx + x * qw + y * qz - z * qy;
    quats[q + 2] = w * qy - x * qz + y * qw + z * qx;
    quats[q + 3] = w * qz + x * qy - y * qx + z * qw;
  }
  for (const [name, channel] of Object.entries(manifest.channels)) {
    if (channel.track < 0) continue;
    const size = loose * channel.width * (channel.bits / 8);
    const raw = rawRows(bytes, channel, loose, channel.track + t * size);
    const first = count - loose;
    if (name === "harmonics") {
      now.harmonics.set(raw, first * channel.width);
      continue;
    }
    unpackRows(raw, channel, now[name], first);
    if (name === "scales") {
      for (let i = 3 * first; i < 3 * count; i++) now.scales[i] = Math.exp(now.scales[i]);
    }
  }
}

/**
 * Counting sort, farthest first: writes indices of the Gaussians before the near plane into `order`, returns how many.
 * Self-contained, as its source also runs in a worker.
 */
function sortByDepth(means, count, eye, forward, near, order, scratch) {
  const BUCKETS = 65536;
  if (!scratch.depths || scratch.depths.length < count) {
    scratch.depths = new Float32Array(count);
    scratch.keys = new Uint16Array(count);
    scratch.starts = new Uint32Array(BUCKETS + 1);
  }
  const { depths, keys, starts } = scratch;
  const [fx, fy, fz] = forward;
  const shift = eye[0] * fx + eye[1] * fy + eye[2] * fz;
  let low = Infinity, high = -Infinity;
  for (let i = 0; i < count; i++) {
    const depth = means[3 * i] * fx + means[3 * i + 1] * fy + means[3 * i + 2] * fz - shift;
    depths[i] = depth;
    if (depth < near) continue;
    if (depth < low) low = depth;
    if (depth > high) high = depth;
  }
  if (low > high) return 0;
  const scale = high > low ? (BUCKETS - 1) / (high - low) : 0;
  starts.fill(0);
  for (let i = 0; i < count; i++) {
    if (depths[i] < near) continue;
    keys[i] = (high - depths[i]) * scale;
    starts[keys[i] + 1]++;
  }
  for (let k = 0; k < BUCKETS; k++) starts[k + 1] += starts[k];
  const visible = starts[BUCKETS];
  for (let i = 0; i < count; i++) {
    if (depths[i] >= near) order[starts[keys[i]]++] = i;
  }
  return visible;
}

// ------------------------------------------------------------------------------------------------------ vectors

const add = (a, b) => [a[0] + b[0], a[1] + b[1], a[2] + b[2]];
const subtract = (a, b) => [a[0] - b[0], a[1] - b[1], a[2] - b[2]];
const times = (a, s) => [a[0] * s, a[1] * s, a[2] * s];
const dot = (a, b) => a[0] * b[0] + a[1] * b[1] + a[2] * b[2];
const cross = (a, b) => [a[1] * b[2] - a[2] * b[1], a[2] * b[0] - a[0] * b[2], a[0] * b[1] - a[1] * b[0]];
const unit = (a) => times(a, 1 / Math.hypot(...a));

/** v turned about a unit axis (Rodrigues). */
function turned(v, axis, angle) {
  const c = Math.cos(angle), s = Math.sin(angle);
  return add(add(times(v, c), times(cross(axis, v), s)), times(axis, dot(axis, v) * (1 - c)));
}

// -------------------------------------------------------------------------------------------------------- views

/** A view: where it is, its axes in the world, how far off it orbits, and its lens in pixels of a picture w x h. */
function cameraView(manifest, index, t) {
  const { frames, views } = manifest.cameras;
  const [pose, lens] = [views[index].poses, views[index].lenses];
  const m = pose[frames === 1 ? 0 : t % pose.length], [fx, fy, cx, cy] = lens[lens.length === 1 ? 0 : t % lens.length];
  const view = {
    eye: [m[3], m[7], m[11]],
    right: [m[0], m[4], m[8]],
    down: [m[1], m[5], m[9]],
    forward: [m[2], m[6], m[10]],
    lens: { fx, fy, cx, cy, w: manifest.cameras.width, h: manifest.cameras.height },
  };
  const ahead = dot(subtract(manifest.centre, view.eye), view.forward);
  view.distance = Math.max(ahead, 0.2 * manifest.radius);
  return view;
}

/** A view of the whole scene from above one side, for scenes without cameras. */
function wholeView(manifest) {
  const up = manifest.up;
  const side = unit(cross(up, Math.abs(up[0]) < 0.9 ? [1, 0, 0] : [0, 1, 0]));
  const back = unit(add(add(times(side, -1), times(cross(up, side), 0.6)), times(up, 0.6)));
  const forward = times(back, -1);
  const right = unit(cross(forward, up));
  const distance = 2.4 * manifest.radius;
  return {
    eye: add(manifest.centre, times(back, distance)),
    right,
    down: cross(forward, right),
    forward,
    distance,
    lens: { fx: 1.1, fy: 1.1, cx: 0.5, cy: 0.5, w: 1, h: 1 },
  };
}

/** The lens for a canvas: the whole picture of the camera fits into it, in the middle. */
function fitLens(lens, width, height) {
  const scale = Math.min(width / lens.w, height / lens.h);
  return {
    fx: lens.fx * scale,
    fy: lens.fy * scale,
    cx: lens.cx * scale + (width - lens.w * scale) / 2,
    cy: lens.cy * scale + (height - lens.h * scale) / 2,
    scale,
  };
}

function orbit(view, up, yaw, pitch) {
  const target = add(view.eye, times(view.forward, view.distance));
  const turn = (axis, angle) => {
    for (const name of ["right", "down", "forward"]) view[name] = unit(turned(view[name], axis, angle));
  };
  turn(up, yaw);
  const steep = Math.abs(dot(view.forward, up));
  const next = Math.abs(dot(turned(view.forward, view.right, pitch), up));
  if (next < 0.999 || next < steep) turn(view.right, pitch);
  view.right = unit(cross(view.down, view.forward)); // rounding errors do not add up
  view.down = cross(view.forward, view.right);
  view.eye = subtract(target, times(view.forward, view.distance));
}

function pan(view, right, down) {
  view.eye = add(view.eye, add(times(view.right, right), times(view.down, down)));
}

function zoom(view, factor, radius) {
  const target = add(view.eye, times(view.forward, view.distance));
  view.distance = Math.min(Math.max(view.distance * factor, 1e-3 * radius), 100 * radius);
  view.eye = subtract(target, times(view.forward, view.distance));
}

// ------------------------------------------------------------------------------------------------------ drawing

// Projection of a 3D Gaussian to the picture: EWA splatting as in Kerbl et al. 2023, with the bounds of gsplat 1.5.
const SPLAT_VERTEX = `#version 300 es
precision highp float;
precision highp int;
precision highp sampler2D;
uniform sampler2D means, quats, scales, colors, harmonics;
uniform mat3 turn;
uniform vec3 eye;
uniform vec2 focal, centre, size, span;
uniform float near;
uniform int degree;
layout(location = 0) in vec2 corner;
layout(location = 1) in uint index;
out vec2 place;
flat out vec4 tint;

mat3 rotation(vec4 q) {
  q = normalize(q);
  float w = q.x, x = q.y, y = q.z, z = q.w;
  return mat3(
    1. - 2. * (y * y + z * z), 2. * (x * y + w * z), 2. * (x * z - w * y),
    2. * (x * y - w * z), 1. - 2. * (x * x + z * z), 2. * (y * z + w * x),
    2. * (x * z + w * y), 2. * (y * z - w * x), 1. - 2. * (x * x + y * y));
}

vec3 coefficient(int k) {
  int at = int(index) * ((degree + 1) * (degree + 1) - 1) + k - 1;
  return span.x + span.y * texelFetch(harmonics, ivec2(at & 2047, at >> 11), 0).rgb;
}

vec3 glow(vec3 d) {
  vec3 sum = vec3(0.);
  if (degree < 1) return sum;
  float x = d.x, y = d.y, z = d.z;
  sum += 0.4886025119029199 * (-y * coefficient(1) + z * coefficient(2) - x * coefficient(3));
  if (degree < 2) return sum;
  sum += 1.0925484305920792 * (x * y * coefficient(4) - y * z * coefficient(5) - x * z * coefficient(7));
  sum += 0.31539156525252005 * (2. * z * z - x * x - y * y) * coefficient(6);
  sum += 0.5462742152960396 * (x * x - y * y) * coefficient(8);
  if (degree < 3) return sum;
  sum += -0.5900435899266435 * y * (3. * x * x - y * y) * coefficient(9);
  sum += 2.890611442640554 * x * y * z * coefficient(10);
  sum += -0.4570457994644658 * y * (4. * z * z - x * x - y * y) * coefficient(11);
  sum += 0.3731763325901154 * z * (2. * z * z - 3. * x * x - 3. * y * y) * coefficient(12);
  sum += -0.4570457994644658 * x * (4. * z * z - x * x - y * y) * coefficient(13);
  sum += 1.445305721320277 * z * (x * x - y * y) * coefficient(14);
  sum += -0.5900435899266435 * x * (x * x - 3. * y * y) * coefficient(15);
  return sum;
}

void main() {
  ivec2 at = ivec2(int(index) & 1023, int(index) >> 10);
  vec3 mean = texelFetch(means, at, 0).xyz;
  vec4 color = texelFetch(colors, at, 0);
  vec3 local = turn * (mean - eye);
  gl_Position = vec4(0., 0., 2., 1.); // outside: not drawn
  if (local.z < near || color.a < 1. / 255.) return;

  vec3 scale = texelFetch(scales, at, 0).xyz;
  mat3 axes = turn * rotation(texelFetch(quats, at, 0));
  mat3 spread = mat3(axes[0] * scale.x, axes[1] * scale.y, axes[2] * scale.z);
  mat3 sigma = spread * transpose(spread);

  vec2 margin = 0.15 * size / focal;
  vec2 slope = clamp(local.xy / local.z, -centre / focal - margin, (size - centre) / focal + margin);
  vec3 across = vec3(focal.x / local.z, 0., -focal.x * slope.x / local.z);
  vec3 along = vec3(0., focal.y / local.z, -focal.y * slope.y / local.z);
  float a = dot(across, sigma * across) + 0.3, b = dot(across, sigma * along), c = dot(along, sigma * along) + 0.3;

  float middle = 0.5 * (a + c), half_gap = sqrt(0.25 * (a - c) * (a - c) + b * b);
  float large = middle + half_gap, small = max(middle - half_gap, 0.3); // 0.3 was added to both
  vec2 axis = abs(b) > 1e-6 * large ? normalize(vec2(b, large - a)) : (a >= c ? vec2(1., 0.) : vec2(0., 1.));
  float reach = sqrt(2. * log(255. * color.a)); // further out it adds less than 1/255
  place = reach * corner;
  vec2 pixel = focal * local.xy / local.z + centre
    + place.x * sqrt(large) * axis + place.y * sqrt(small) * vec2(-axis.y, axis.x);
  gl_Position = vec4(2. * pixel.x / size.x - 1., 1. - 2. * pixel.y / size.y, 0., 1.);
  tint = vec4(max(color.rgb + glow(normalize(mean - eye)), 0.), color.a);
}`;

const SPLAT_FRAGMENT = `#version 300 es
precision highp float;
in vec2 place;
flat in vec4 tint;
out vec4 pixel;
void main() {
  float alpha = min(0.999, tint.a * exp(-0.5 * dot(place, place)));
  if (alpha < 1. / 255.) discard;
  pixel = vec4(tint.rgb * alpha, alpha);
}`;

const LINE_VERTEX = `#version 300 es
precision highp float;
uniform mat3 turn;
uniform vec3 eye;
uniform vec2 focal, centre, size;
layout(location = 0) in vec3 point;
void main() {
  vec3 local = turn * (point - eye);
  vec2 pixel = focal * local.xy + centre * local.z;
  gl_Position = vec4(2. * pixel.x / size.x - local.z, local.z - 2. * pixel.y / size.y, 0., local.z);
}`;

const LINE_FRAGMENT = `#version 300 es
precision highp float;
uniform vec4 tint;
out vec4 pixel;
void main() { pixel = vec4(tint.rgb * tint.a, tint.a); }`;

function compile(gl, vertex, fragment) {
  const program = gl.createProgram();
  for (const [kind, source] of [[gl.VERTEX_SHADER, vertex], [gl.FRAGMENT_SHADER, fragment]]) {
    const shader = gl.createShader(kind);
    gl.shaderSource(shader, source);
    gl.compileShader(shader);
    gl.attachShader(program, shader);
    if (!gl.getShaderParameter(shader, gl.COMPILE_STATUS) && !gl.isContextLost()) {
      throw new Error(gl.getShaderInfoLog(shader));
    }
  }
  gl.linkProgram(program);
  if (!gl.getProgramParameter(program, gl.LINK_STATUS) && !gl.isContextLost()) {
    throw new Error(gl.getProgramInfoLog(program));
  }
  const names = {};
  for (let i = 0; i < gl.getProgramParameter(program, gl.ACTIVE_UNIFORMS); i++) {
    const { name } = gl.getActiveUniform(program, i);
    names[name] = gl.getUniformLocation(program, name);
  }
  return { program, names };
}

/** Everything that lives on the graphics card. */
class Renderer {
  constructor(gl, scene) {
    this.gl = gl;
    this.scene = scene;
    this.height = Math.max(1, Math.ceil(scene.count / ROW));
    this.terms = (scene.manifest.degree + 1) ** 2 - 1;
    const tall = Math.max(this.height, Math.ceil((scene.count * this.terms) / 2048));
    if (tall > gl.getParameter(gl.MAX_TEXTURE_SIZE)) {
      throw new Error(`This graphics card cannot hold ${scene.count} Gaussians of degree ${scene.manifest.degree}.`);
    }
    this.splats = compile(gl, SPLAT_VERTEX, SPLAT_FRAGMENT);
    this.lines = compile(gl, LINE_VERTEX, LINE_FRAGMENT);
    this.textures = {};
    for (const name of ["means", "quats", "scales", "colors"]) {
      this.textures[name] = this.texture(gl.RGBA32F, ROW, this.height);
    }
    this.textures.harmonics = this.texture(gl.RGBA8, 2048, Math.max(1, Math.ceil((scene.count * this.terms) / 2048)));
    this.staging = new Float32Array(4 * ROW * this.height);

    this.quad = gl.createVertexArray();
    gl.bindVertexArray(this.quad);
    gl.bindBuffer(gl.ARRAY_BUFFER, gl.createBuffer());
    gl.bufferData(gl.ARRAY_BUFFER, new Float32Array([-1, -1, 1, -1, -1, 1, 1, 1]), gl.STATIC_DRAW);
    gl.enableVertexAttribArray(0);
    gl.vertexAttribPointer(0, 2, gl.FLOAT, false, 0, 0);
    this.order = gl.createBuffer();
    gl.bindBuffer(gl.ARRAY_BUFFER, this.order);
    gl.bufferData(gl.ARRAY_BUFFER, 4 * Math.max(1, scene.count), gl.DYNAMIC_DRAW);
    gl.enableVertexAttribArray(1);
    gl.vertexAttribIPointer(1, 1, gl.UNSIGNED_INT, 0, 0);
    gl.vertexAttribDivisor(1, 1);

    this.wires = gl.createVertexArray();
    gl.bindVertexArray(this.wires);
    this.points = gl.createBuffer();
    gl.bindBuffer(gl.ARRAY_BUFFER, this.points);
    gl.enableVertexAttribArray(0);
    gl.vertexAttribPointer(0, 3, gl.FLOAT, false, 0, 0);
    gl.bindVertexArray(null);
    this.visible = 0;
    this.segments = 0;
    this.upload(0);
  }

  texture(format, width, height) {
    const { gl } = this;
    const texture = gl.createTexture();
    gl.bindTexture(gl.TEXTURE_2D, texture);
    gl.texStorage2D(gl.TEXTURE_2D, 1, format, width, height);
    for (const side of [gl.TEXTURE_MIN_FILTER, gl.TEXTURE_MAG_FILTER]) gl.texParameteri(gl.TEXTURE_2D, side, gl.NEAREST);
    return texture;
  }

  /** Send the rows of the textures from Gaussian `first` on. */
  upload(first) {
    const { gl, scene, staging } = this;
    if (first >= scene.count) return;
    const { now, count } = scene;
    const row = Math.floor(first / ROW);
    for (const [name, width] of [["means", 3], ["quats", 4], ["scales", 3], ["colors", 3]]) {
      const values = now[name];
      for (let i = row * ROW; i < count; i++) {
        for (let k = 0; k < width; k++) staging[4 * i + k] = values[width * i + k];
        if (name === "colors") staging[4 * i + 3] = now.opacities[i];
      }
      gl.bindTexture(gl.TEXTURE_2D, this.textures[name]);
      gl.texSubImage2D(
        gl.TEXTURE_2D, 0, 0, row, ROW, this.height - row, gl.RGBA, gl.FLOAT, staging.subarray(4 * ROW * row));
    }
    if (this.terms && (first === 0 || scene.manifest.channels.harmonics.track >= 0)) this.uploadHarmonics();
  }

  uploadHarmonics() {
    const { gl, scene } = this;
    const texels = scene.count * this.terms, height = Math.ceil(texels / 2048);
    const packed = new Uint8Array(4 * 2048 * height);
    for (let i = 0; i < texels; i++) packed.set(scene.now.harmonics.subarray(3 * i, 3 * i + 3), 4 * i);
    gl.bindTexture(gl.TEXTURE_2D, this.textures.harmonics);
    gl.texSubImage2D(gl.TEXTURE_2D, 0, 0, 0, 2048, height, gl.RGBA, gl.UNSIGNED_BYTE, packed);
  }

  setOrder(order, visible) {
    const { gl } = this;
    gl.bindBuffer(gl.ARRAY_BUFFER, this.order);
    gl.bufferSubData(gl.ARRAY_BUFFER, 0, order, 0, visible);
    this.visible = visible;
  }

  /** Lines: pairs of points. */
  setLines(points) {
    const { gl } = this;
    gl.bindBuffer(gl.ARRAY_BUFFER, this.points);
    gl.bufferData(gl.ARRAY_BUFFER, new Float32Array(points.flat()), gl.DYNAMIC_DRAW);
    this.segments = points.length;
  }

  draw(view, background, lineColor) {
    const { gl, scene } = this;
    const { width, height } = gl.canvas;
    const lens = fitLens(view.lens, width, height);
    gl.viewport(0, 0, width, height);
    gl.clearColor(...background, 1);
    gl.clear(gl.COLOR_BUFFER_BIT);
    gl.enable(gl.BLEND);
    gl.blendFunc(gl.ONE, gl.ONE_MINUS_SRC_ALPHA); // colours come multiplied by alpha, farthest first
    const place = ({ program, names }) => {
      gl.useProgram(program);
      const { right: r, down: d, forward: f } = view;
      gl.uniformMatrix3fv(names.turn, false, [r[0], d[0], f[0], r[1], d[1], f[1], r[2], d[2], f[2]]);
      gl.uniform3fv(names.eye, view.eye);
      gl.uniform2f(names.focal, lens.fx, lens.fy);
      gl.uniform2f(names.centre, lens.cx, lens.cy);
      gl.uniform2f(names.size, width, height);
    };
    place(this.splats);
    const { names } = this.splats;
    Object.entries(this.textures).forEach(([name, texture], slot) => {
      gl.activeTexture(gl.TEXTURE0 + slot);
      gl.bindTexture(gl.TEXTURE_2D, texture);
      gl.uniform1i(names[name], slot);
    });
    gl.activeTexture(gl.TEXTURE0);
    const { degree, channels } = scene.manifest;
    const [low, high] = degree ? [channels.harmonics.low[0], channels.harmonics.high[0]] : [0, 0];
    gl.uniform2f(names.span, low, high - low);
    gl.uniform1i(names.degree, degree);
    gl.uniform1f(names.near, NEAR);
    gl.bindVertexArray(this.quad);
    gl.drawArraysInstanced(gl.TRIANGLE_STRIP, 0, 4, this.visible);
    if (this.segments) {
      place(this.lines);
      gl.uniform4fv(this.lines.names.tint, lineColor);
      gl.bindVertexArray(this.wires);
      gl.drawArrays(gl.LINES, 0, this.segments);
    }
    gl.bindVertexArray(null);
  }
}

/** Wire pyramids of all cameras at frame t but the one looked through, as pairs of points. */
function cameraLines(manifest, t, skip) {
  const points = [];
  const depth = 0.15 * manifest.radius;
  manifest.cameras.views.forEach((_, index) => {
    if (index === skip) return;
    const { eye, right, down, forward, lens } = cameraView(manifest, index, t);
    const at = (x, y) => {
      const ray = add(times(right, (x - lens.cx) / lens.fx), times(down, (y - lens.cy) / lens.fy));
      return add(eye, times(add(ray, forward), depth));
    };
    const corners = [at(0, 0), at(lens.w, 0), at(lens.w, lens.h), at(0, lens.h)];
    corners.forEach((corner, i) => points.push(eye, corner, corner, corners[(i + 1) % 4]));
    const top = at(lens.w / 2, -0.35 * lens.h); // a roof shows which way is up
    points.push(corners[0], top, top, corners[1]);
  });
  return points;
}

/** Sorts here or, for large scenes, in a worker; calls back with the order. */
class Sorter {
  constructor(scene, apart, done) {
    this.scene = scene;
    this.done = done;
    this.order = new Uint32Array(scene.count);
    this.scratch = {};
    this.worker = apart ? this.start() : null;
    this.stale = true; // the worker has old means
  }

  start() {
    const source = `"use strict"; ${sortByDepth}; let means; const scratch = {};
      onmessage = ({ data }) => {
        means = data.means || means;
        const order = new Uint32Array(means.length / 3);
        const visible = sortByDepth(means, order.length, data.eye, data.forward, data.near, order, scratch);
        postMessage({ order, visible }, [order.buffer]);
      };`;
    try {
      const worker = new Worker(URL.createObjectURL(new Blob([source], { type: "text/javascript" })));
      worker.onmessage = ({ data }) => {
        this.busy = false;
        this.done(data.order, data.visible);
        if (this.waiting) this.sort(this.waiting);
      };
      worker.onerror = () => {
        this.worker = null; // not allowed here: sort in place from now on
        this.busy = false;
        if (this.last) this.sort(this.last);
      };
      return worker;
    } catch {
      return null;
    }
  }

  sort(view) {
    const { eye, forward } = view;
    this.last = view;
    if (!this.worker) {
      const { now, count } = this.scene;
      this.done(this.order, sortByDepth(now.means, count, eye, forward, NEAR, this.order, this.scratch));
      return;
    }
    this.waiting = this.busy ? view : null;
    if (this.busy) return;
    this.busy = true;
    this.worker.postMessage({ eye, forward, near: NEAR, means: this.stale ? this.scene.now.means.slice() : null });
    this.stale = false;
  }
}

// ----------------------------------------------------------------------------------------------------- the page

const KEYS = [
  ["Space", "play or pause"],
  ["← →", "one frame back or on"],
  ["Home, End", "first, last frame"],
  ["1 to 9", "look through a camera"],
  ["R", "back to the first view"],
  ["+ −", "closer, further"],
  ["B", "next background"],
  ["C", "show the cameras"],
  ["?", "this list"],
];

function startPage() {
  const find = (id) => document.getElementById(id);
  const fail = (text) => {
    find("message").textContent = text;
    find("message").hidden = false;
    document.body.classList.add("failed");
  };
  window.addEventListener("error", (event) => fail(`The viewer stopped: ${event.message}`));

  const manifest = JSON.parse(find("manifest").textContent);
  const canvas = find("canvas");
  const gl = canvas.getContext("webgl2", { alpha: false, antialias: false, powerPreference: "high-performance" });
  if (!gl) {
    fail(
      "This page draws with WebGL 2, which this browser lacks or has switched off. Open it in a current Firefox, " +
      "Chrome, Edge or Safari with hardware acceleration switched on.");
    return;
  }
  canvas.addEventListener("webglcontextlost", () => fail("The graphics card was reset. Reload the page to go on."));

  const hash = new URLSearchParams(location.hash.slice(1));
  const scene = decodeScene(manifest, decodeBase64(find("data").textContent));
  find("data").remove();
  const renderer = new Renderer(gl, scene);
  const views = manifest.cameras ? manifest.cameras.views : [];
  const calm = window.matchMedia("(prefers-reduced-motion: reduce)").matches;

  const state = { camera: -1, view: null, frame: -1, position: 0, playing: manifest.frames > 1 && !calm && !hash.has("frame") };
  let resort = true, redraw = true, drawn = 0, counted = performance.now(), before = counted;
  const sorter = new Sorter(scene, scene.count >= WORKER_FROM || hash.has("worker"), (order, visible) => {
    renderer.setOrder(order, visible);
    redraw = true;
  });
  const moved = () => { resort = redraw = true; };

  const look = (index) => {
    state.camera = index;
    state.view = index < 0 ? wholeView(manifest) : cameraView(manifest, index, state.position | 0);
    showCamera();
    moved();
  };
  const free = () => { // the reader takes the camera into the own hand
    if (state.camera < 0) return;
    state.camera = -1;
    showCamera();
  };
  const reset = () => look(views.length ? 0 : -1);

  const showFrame = (t) => {
    t = Math.min(Math.max(t, 0), manifest.frames - 1);
    if (t === state.frame) return;
    state.frame = t;
    poseScene(scene, t);
    renderer.upload(scene.still);
    sorter.stale ||= scene.still < scene.count;
    if (state.camera >= 0 && manifest.cameras.frames > 1) state.view = cameraView(manifest, state.camera, t);
    find("frame").value = t;
    find("time").textContent = `${t + 1} / ${manifest.frames} · ${(t / manifest.fps).toFixed(2)} s`;
    showLines();
    moved();
  };
  const seek = (t) => {
    state.position = Math.min(Math.max(t, 0), manifest.frames - 1);
    showFrame(state.position);
  };
  const play = (on) => {
    state.playing = on && manifest.frames > 1;
    find("play").textContent = state.playing ? "❚❚" : "▶";
    find("play").setAttribute("aria-label", state.playing ? "Pause" : "Play");
  };

  // background
  const BACKGROUNDS = { page: null, black: [0, 0, 0], grey: [0.5, 0.5, 0.5], white: [1, 1, 1] };
  let background = [0, 0, 0];
  const readColor = (name) => {
    const text = getComputedStyle(document.documentElement).getPropertyValue(name).trim();
    return [1, 3, 5].map((i) => parseInt(text.slice(i, i + 2), 16) / 255);
  };
  const showBackground = () => {
    background = BACKGROUNDS[find("background").value] || readColor("--stage");
    find("gate").style.borderColor = background[0] + background[1] + background[2] > 1.5 ? "#0008" : "#fff8";
    redraw = true;
  };

  // cameras
  const buttons = views.map(({ name }, index) => {
    const button = document.createElement("button");
    button.textContent = name;
    button.title = index < 9 ? `Look through ${name} (${index + 1})` : `Look through ${name}`;
    button.addEventListener("click", () => look(index));
    find("cameras").append(button);
    return button;
  });
  const showCamera = () => {
    buttons.forEach((button, index) => button.setAttribute("aria-pressed", index === state.camera));
    showGate();
    showLines();
  };
  const showLines = () => {
    renderer.setLines(find("wires").checked ? cameraLines(manifest, Math.max(0, state.frame), state.camera) : []);
    redraw = true;
  };
  const showGate = () => { // where the picture of the camera ends
    const gate = find("gate"), [w, h] = [canvas.clientWidth, canvas.clientHeight];
    gate.hidden = state.camera < 0;
    if (gate.hidden) return;
    const { scale } = fitLens(state.view.lens, w, h);
    const [gw, gh] = [state.view.lens.w * scale, state.view.lens.h * scale];
    Object.assign(gate.style, { width: `${gw}px`, height: `${gh}px`, left: `${(w - gw) / 2}px`, top: `${(h - gh) / 2}px` });
  };

  // pointer: one finger or button turns, two fingers or the other button move, wheel and pinch zoom
  const pointers = new Map();
  const pixel = () => state.view.distance / fitLens(state.view.lens, canvas.clientWidth, canvas.clientHeight).fx;
  canvas.addEventListener("contextmenu", (event) => event.preventDefault());
  canvas.addEventListener("pointerdown", (event) => {
    canvas.setPointerCapture(event.pointerId);
    pointers.set(event.pointerId, [event.clientX, event.clientY]);
  });
  for (const name of ["pointerup", "pointercancel"]) {
    canvas.addEventListener(name, (event) => pointers.delete(event.pointerId));
  }
  canvas.addEventListener("pointermove", (event) => {
    const last = pointers.get(event.pointerId);
    if (!last) return;
    const [dx, dy] = [event.clientX - last[0], event.clientY - last[1]];
    if (!dx && !dy) return;
    free();
    const other = [...pointers].find(([id]) => id !== event.pointerId);
    if (other) {
      const gap = (x, y) => Math.hypot(x - other[1][0], y - other[1][1]) || 1;
      zoom(state.view, gap(...last) / gap(event.clientX, event.clientY), manifest.radius);
      pan(state.view, (-dx / 2) * pixel(), (-dy / 2) * pixel());
    } else if (event.shiftKey || event.ctrlKey || event.buttons & 6) {
      pan(state.view, -dx * pixel(), -dy * pixel());
    } else {
      orbit(state.view, manifest.up, -dx * 0.006, -dy * 0.006);
    }
    pointers.set(event.pointerId, [event.clientX, event.clientY]);
    moved();
  });
  canvas.addEventListener("wheel", (event) => {
    event.preventDefault();
    free();
    const lines = event.deltaMode ? 24 : 1, pinch = event.ctrlKey ? 6 : 1;
    zoom(state.view, Math.exp(Math.min(Math.max(event.deltaY * lines * pinch * 0.0012, -0.5), 0.5)), manifest.radius);
    moved();
  }, { passive: false });

  // controls and keys
  find("play").addEventListener("click", () => play(!state.playing));
  find("frame").addEventListener("input", () => { play(false); seek(Number(find("frame").value)); });
  find("reset").addEventListener("click", reset);
  find("background").addEventListener("change", showBackground);
  find("wires").addEventListener("change", showLines);
  find("help").addEventListener("click", () => find("keys").showModal());
  for (const [key, text] of KEYS) {
    const row = find("keylist").insertRow();
    row.insertCell().append(Object.assign(document.createElement("kbd"), { textContent: key }));
    row.insertCell().textContent = text;
  }
  const step = (by) => { play(false); seek(state.frame + by); };
  const actions = {
    " ": () => play(!state.playing),
    ArrowLeft: () => step(-1),
    ArrowRight: () => step(1),
    Home: () => step(-manifest.frames),
    End: () => step(manifest.frames),
    r: reset,
    "+": () => { free(); zoom(state.view, 0.85, manifest.radius); moved(); },
    "-": () => { free(); zoom(state.view, 1 / 0.85, manifest.radius); moved(); },
    b: () => {
      const select = find("background");
      select.selectedIndex = (select.selectedIndex + 1) % select.options.length;
      showBackground();
    },
    c: () => { if (views.length) { find("wires").checked = !find("wires").checked; showLines(); } },
    "?": () => find("keys").showModal(),
  };
  actions["="] = actions["+"];
  actions.h = actions["?"];
  document.addEventListener("keydown", (event) => {
    if (event.ctrlKey || event.metaKey || event.altKey || find("keys").open) return;
    const { target, key } = event;
    if (target.tagName === "SELECT" || (key === " " && target.tagName === "INPUT" && target.type === "checkbox")) return;
    if (key === " " && target.tagName === "BUTTON" && target !== find("play")) return;
    const name = key.length === 1 ? key.toLowerCase() : key;
    const act = /^[1-9]$/.test(name) && views[name - 1] ? () => look(name - 1) : actions[name];
    if (!act) return;
    event.preventDefault();
    act();
  });
  // A button that has the focus reacts to the release of the space bar as well: the page has already reacted to it.
  find("play").addEventListener("keyup", (event) => { if (event.key === " ") event.preventDefault(); });

  const resize = () => {
    const ratio = Math.min(window.devicePixelRatio || 1, 2);
    canvas.width = Math.max(1, Math.round(canvas.clientWidth * ratio));
    canvas.height = Math.max(1, Math.round(canvas.clientHeight * ratio));
    showGate();
    redraw = true;
  };

  const tick = (now) => {
    requestAnimationFrame(tick);
    const passed = Math.min(now - before, 250) / 1000;
    before = now;
    if (state.playing) {
      state.position = (state.position + passed * manifest.fps * Number(find("speed").value)) % manifest.frames;
      showFrame(Math.floor(state.position));
    }
    if (resort) {
      resort = false;
      sorter.sort(state.view);
    }
    if (redraw) {
      redraw = false;
      drawn++;
      renderer.draw(state.view, background, readColor("--accent").concat(0.9));
    }
    if (now - counted > 1000) {
      find("rate").textContent = drawn ? ` · ${Math.round((1000 * drawn) / (now - counted))} drawn/s` : "";
      [drawn, counted] = [0, now];
    }
  };

  const number = (value) => value.toLocaleString("en");
  const timing = manifest.frames > 1 ? ` · ${number(manifest.frames)} frames at ${manifest.fps} fps` : "";
  find("facts").textContent = `${number(scene.count)} Gaussians${timing}`;
  find("frame").max = manifest.frames - 1;
  find("timeline").hidden = manifest.frames < 2;
  find("wiresbox").hidden = !views.length;
  document.body.classList.toggle("bare", hash.has("bare"));
  if (hash.get("background") in BACKGROUNDS) find("background").value = hash.get("background");
  find("wires").checked = hash.has("cameras") && views.length > 0;
  seek(Number(hash.get("frame")) || 0);
  const chosen = views.findIndex(({ name }) => name === hash.get("camera"));
  if (chosen >= 0) look(chosen);
  else reset();
  play(state.playing);
  new ResizeObserver(resize).observe(canvas);
  window.matchMedia("(prefers-color-scheme: dark)").addEventListener("change", showBackground);
  resize();
  showBackground();
  requestAnimationFrame(tick);
}

if (typeof document !== "undefined") startPage();
else module.exports = { decodeScene, poseScene, sortByDepth, cameraView, fitLens, orbit, wholeView, cameraLines };
