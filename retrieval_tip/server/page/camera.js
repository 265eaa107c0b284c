// The camera, with a live preview and a button that takes a photo.

import { $, el } from "./dom.js";

let stream = null;
let taking = null;
let taken = 0;

export const hasCamera = Boolean(navigator.mediaDevices?.getUserMedia);

export function stop() {
  for (const track of stream?.getTracks() ?? []) track.stop();
  stream = null;
  $("camera-video").srcObject = null;
  $("camera-view").hidden = true;
}

/** Show the live preview, and call `take(file)` for each photo. If there is no camera, throw an Error with the
 *  reason. */
export async function open(take, what = "") {
  taking = take;
  $("camera-what").textContent = what;
  try {
    stream ??= await navigator.mediaDevices.getUserMedia({ video: { facingMode: "environment" } });
  } catch (error) {
    throw new Error(error.name === "NotAllowedError" ? "The browser does not allow this page to use the camera." : "No camera was found.");
  }
  const video = $("camera-video");
  $("camera-view").hidden = false;
  if (video.srcObject !== stream) {
    video.srcObject = stream;
    $("camera-take").disabled = true; // until the first frame arrives
    await new Promise((resolve) => video.addEventListener("loadeddata", resolve, { once: true }));
    $("camera-take").disabled = false;
  }
  $("camera-take").focus();
}

$("camera-take").addEventListener("click", () => {
  const video = $("camera-video");
  const canvas = el("canvas", { width: video.videoWidth, height: video.videoHeight });
  canvas.getContext("2d").drawImage(video, 0, 0);
  const done = (blob) => blob && taking(new File([blob], `camera ${++taken}.jpg`, { type: "image/jpeg" }));
  canvas.toBlob(done, "image/jpeg", 0.92);
});
$("camera-stop").addEventListener("click", stop);
